"""Few-shot classification on fixed features, centred and of unit length (CL2N of SimpleShot), by nearest centroid (J. Snell,
K. Swersky, R. Zemel, "Prototypical networks", 2017, https://arxiv.org/abs/1703.05175) or by logistic regression (Y. Tian et
al., "Rethinking few-shot image classification", 2020, https://arxiv.org/abs/2003.11539; L2, C = 1).

An episode draws `ways` classes and from each `shots` samples to learn from and `queries` others to classify, all from the
test split. The score is the mean accuracy over episodes; a class with too few samples is never drawn.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from darkmatter.evaluations import Score, Skipped, Subject, _episodes, of_draws, unit
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
    classifiers: list[Literal["centroid", "logistic"]] = Field(default=["centroid"], min_length=1)
    """`centroid` has the plain names (`5-way 5-shot`), `logistic` says so (`5-way 5-shot logistic`)."""


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    features = unit(subject.queries, subject.bank.mean(0))
    for ways in config.ways:
        for shots in config.shots:
            names = {one: _name(ways, shots, one) for one in config.classifiers}
            drawn = _episodes.draw(subject.query_labels, ways, shots, config.queries, config.episodes, seed)
            if isinstance(drawn, str):
                yield from (Skipped(name=name, reason=drawn) for name in names.values())
                continue
            for classifier, name in names.items():
                accuracies = _episodes.accuracy(features, features, drawn, shots, classifier)
                yield of_draws(name, accuracies, classes=drawn.shape[1])


def _name(ways: int | str, shots: int, classifier: str) -> str:
    return f"{ways}-way {shots}-shot" + ("" if classifier == "centroid" else f" {classifier}")
