"""RankMe of the test embeddings: how many dimensions the representation really uses. Needs no labels."""

from collections.abc import Iterator

import torch

from darkmatter import health
from darkmatter.evaluations import Score, Subject
from darkmatter.params import Config as _Config


class Config(_Config):
    pass


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score]:
    yield Score(name="rankme", mean=health.rankme(torch.tensor(subject.queries)))
