"""Few-shot classification by nearest centroid: J. Snell, K. Swersky, R. Zemel, "Prototypical networks" (2017),
https://arxiv.org/abs/1703.05175, on fixed features, centred and of unit length (CL2N of SimpleShot).

An episode draws `ways` classes and from each `shots` samples to learn from and `queries` others to classify, all from the
test split. The score is the mean accuracy over episodes; a class with too few samples is never drawn.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from darkmatter.evaluations import Score, Skipped, Subject, of_draws, unit
from darkmatter.params import Config as _Config


class Config(_Config):
    ways: list[int | Literal["all"]] = Field(min_length=1)
    """Classes in an episode; `all` is every class that has enough samples."""
    shots: list[int] = Field(min_length=1)
    """Labelled samples a class."""
    episodes: int = Field(ge=2)
    """How many are drawn; the interval shrinks with their square root."""
    queries: int = Field(gt=0)
    """Samples a class to classify."""


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    features = unit(subject.queries, subject.bank.mean(0))
    for ways in config.ways:
        for shots in config.shots:
            classes = _classes(subject.query_labels, shots + config.queries)
            drawn = len(classes) if ways == "all" else ways
            name = f"{ways}-way {shots}-shot"
            if len(classes) < max(2, drawn):
                least = shots + config.queries
                yield Skipped(name=name, reason=f"{len(classes)} classes have {least} labelled test samples")
                continue
            random = np.random.default_rng([seed, drawn, shots])
            accuracies = np.empty(config.episodes)
            for episode in range(config.episodes):
                members = [classes[index] for index in random.choice(len(classes), drawn, replace=False)]
                picks = np.stack([random.choice(m, shots + config.queries, replace=False) for m in members])
                accuracies[episode] = _accuracy(features[picks], shots)  # (ways, shots + queries, D)
            yield of_draws(name, accuracies, classes=drawn)


def _classes(labels: Int64[np.ndarray, " samples"], least: int) -> list[Int64[np.ndarray, " members"]]:
    members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    return [some for some in members if len(some) >= least]


def _accuracy(features: np.ndarray, shots: int) -> float:
    centroids = features[:, :shots].mean(1)  # (ways, D)
    queries = features[:, shots:]  # (ways, queries, D)
    # |q - c|^2 = |q|^2 - 2 q.c + |c|^2; the first does not decide.
    distances = np.square(centroids).sum(1) - 2 * queries @ centroids.T  # (ways, queries, ways)
    return float((distances.argmin(2) == np.arange(len(features))[:, None]).mean())
