"""Health of the test embeddings, without labels; RankMe and the energy margin are evaluations of their own.

lidar, alpha_req: of the embeddings; alignment: of two views of a sample; uniformity: of the embeddings. What is good: a high
LiDAR, an alpha near 1, a low alignment and a low uniformity together. The formulas are in `darkmatter/health.py`.
"""

from collections.abc import Iterator

import torch

from darkmatter import health
from darkmatter.evaluations import Score, Subject
from darkmatter.params import Config as _Config

_PAIRWISE = 2000  # samples for uniformity, which looks at all pairs


class Config(_Config):
    pass


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score]:
    embeddings = torch.tensor(subject.queries)
    yield Score(name="alpha_req", mean=health.alpha_req(embeddings))
    yield Score(name="uniformity", mean=health.uniformity(embeddings[:_PAIRWISE]))
    if subject.views is not None:
        views = torch.tensor(subject.views)
        yield Score(name="lidar", mean=health.lidar(views))
        yield Score(name="alignment", mean=health.alignment(views[:, 0], views[:, 1]))
