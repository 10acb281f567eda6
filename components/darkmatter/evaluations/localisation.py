"""Does the representation know where? Each test picture, shrunk, lies as an object somewhere on an even ground.

position      how much of the object's place a linear map of the embedding tells: R^2 of ridge regression, each half of the
              samples judged by what the other half taught. A representation that forgets where things are has 0
segmentation  are patches on the object more like the patch in its middle than those beside it are: the AUROC of their
              cosine, without any learning; for networks that have patches
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float

from darkmatter import changes, health
from darkmatter.changes import Change
from darkmatter.evaluations import Score, Skipped, Subject, of_draws
from darkmatter.params import Config as _Config

PASTE = Change("paste")
_RIDGE = 0.01  # of the mean variance of a feature, times the samples


class Config(_Config):
    pass


def wanted(config: Config) -> Sequence[Change]:
    return [PASTE]


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    features = subject.changed[PASTE].astype(np.float64)
    numbers = np.arange(len(features))
    if len(numbers) < 20:
        yield Skipped(name="position", reason=f"{len(numbers)} test samples are too few to learn a place from")
        return
    places = changes.pasted_at(numbers, seed=seed)
    errors = np.empty(len(places))
    for half in (0, 1):
        learn, judge = numbers % 2 != half, numbers % 2 == half
        told = _regress(features[learn], places[learn], features[judge])
        errors[judge] = np.square(told - places[judge]).sum(1)
    spread = np.square(places - places.mean(0)).sum(1).mean()
    yield of_draws("position", 1 - errors / spread)
    if subject.similarity is not None:
        yield of_draws("segmentation", _areas(subject.similarity, seed))


def _regress(features: np.ndarray, places: np.ndarray, asked: np.ndarray) -> Float[np.ndarray, "asked 2"]:
    mean, centre = features.mean(0), places.mean(0)
    known = features - mean
    scale = max(float(np.square(known).mean()), 1e-12)
    penalty = _RIDGE * scale * len(known) * np.eye(known.shape[1])
    weights = np.linalg.solve(known.T @ known + penalty, known.T @ (places - centre))
    return (asked - mean) @ weights + centre


def _areas(similarity: Float[np.ndarray, "samples grid grid"], seed: int) -> Float[np.ndarray, " judged"]:
    """Of each sample in which some patches are on the object and some beside it."""
    grid = similarity.shape[1]
    masks = changes.pasted_mask(np.arange(len(similarity)), grid, seed=seed)
    judged = [
        (torch.from_numpy(map_[~mask]), torch.from_numpy(map_[mask]))
        for map_, mask in zip(similarity, masks, strict=True)
        if mask.sum() > 1 and not mask.all()
    ]
    return np.array([health.auroc(beside, inside) for beside, inside in judged])
