"""What a representation is worth. One file an evaluation; each section under `evaluate` in params.yaml runs one.

An evaluation module defines `Config` and `scores(config, subject, *, seed) -> Iterator[Score | Skipped]`. It is called
once for each subject with the same seed, so that all meet the same episodes and their differences are paired.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A representation of the data, under evaluation: the pretrained network, or one of those it must beat."""

    name: str
    bank: Float[np.ndarray, "bank features"]  # of the training split
    bank_labels: Int64[np.ndarray, " bank"]  # -1 where there is none
    queries: Float[np.ndarray, "queries features"]  # of the test split
    query_labels: Int64[np.ndarray, " queries"]
    compatible: Float[np.ndarray, " queries"] | None = None  # energies of two views of one test sample
    incompatible: Float[np.ndarray, " queries"] | None = None  # energies of views of two test samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A number, and how sure it is."""

    name: str  # of the protocol: "5-way 5-shot"
    mean: float
    ci95: float | None = None  # half the width of the 95% interval
    draws: Float[np.ndarray, " draws"] | None = None  # the values behind the mean, for paired differences
    classes: int | None = None  # how many there were to choose from, where the data decides that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """What the data does not allow to measure, and why."""

    name: str  # of the protocol
    reason: str


def of_draws(name: str, draws: Float[np.ndarray, " draws"], *, classes: int | None = None) -> Score:
    """Mean and normal 95% interval of independent draws."""
    return Score(name=name, mean=float(draws.mean()), ci95=half_width(draws), draws=draws, classes=classes)


def half_width(draws: Float[np.ndarray, " draws"]) -> float:
    return float(1.96 * draws.std(ddof=1) / np.sqrt(len(draws)))


def unit(
    features: Float[np.ndarray, "samples features"], centre: Float[np.ndarray, " features"]
) -> Float[np.ndarray, "samples features"]:
    """Centred on the mean of the unlabelled training features, then of unit length (Y. Wang et al., "SimpleShot",
    2019, https://arxiv.org/abs/1911.04623, CL2N). The same for every subject, raw pixels included."""
    centred = features - centre
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
