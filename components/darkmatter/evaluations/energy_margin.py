"""Energy margin: the AUROC with which the energy tells two views of one test sample from views of two. Needs no labels.

0.5 is collapse, whatever the loss says. Only a network with an objective has an energy; raw pixels have none.
"""

import math
from collections.abc import Iterator

import torch

from darkmatter import health
from darkmatter.evaluations import Score, Subject
from darkmatter.params import Config as _Config


class Config(_Config):
    pass


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score]:
    if subject.compatible is None or subject.incompatible is None:
        return
    area = health.auroc(torch.tensor(subject.compatible), torch.tensor(subject.incompatible))
    interval = _half_width(area, len(subject.compatible), len(subject.incompatible))
    yield Score(name="auroc", mean=area, ci95=interval)


def _half_width(area: float, m: int, n: int) -> float:
    """J. Hanley, B. McNeil, "The meaning and use of the area under a ROC curve" (1982), equation 2."""
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (first - area**2) + (n - 1) * (second - area**2)
    return 1.96 * math.sqrt(max(0.0, variance) / (m * n))
