"""What a representation is worth. One file an evaluation; each section under `evaluate` in params.yaml runs one.

An evaluation module defines `Config` and `scores(config, subject, *, seed) -> Iterator[Score | Skipped]`. It is called
once for each subject with the same seed, so that all meet the same episodes and their differences are paired. One that looks
at changed pictures of the test split says which, by `wanted(config) -> Sequence[Change]`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int64
from scipy.special import stdtrit

from darkmatter.changes import Change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A representation of the data, under evaluation: the pretrained network, or one of those it must beat."""

    name: str
    bank: Float[np.ndarray, "bank features"]  # of the training split
    bank_labels: Int64[np.ndarray, " bank"]  # -1 where there is none
    validation: Float[np.ndarray, "validation features"]  # may be empty
    validation_labels: Int64[np.ndarray, " validation"]
    queries: Float[np.ndarray, "queries features"]  # of the test split
    query_labels: Int64[np.ndarray, " queries"]
    changed: Mapping[Change, Float[np.ndarray, "queries features"]] = dataclasses.field(default_factory=dict)
    views: Float[np.ndarray, "queries views features"] | None = None  # of test samples, as training draws them
    compatible: Float[np.ndarray, " queries"] | None = None  # energies of two views of one test sample
    incompatible: Float[np.ndarray, " queries"] | None = None  # energies of views of two test samples
    similarity: Float[np.ndarray, "queries grid grid"] | None = None  # of patches, to one on the pasted object


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
    """Mean and 95% interval of independent draws."""
    return Score(name=name, mean=float(draws.mean()), ci95=half_width(draws), draws=draws, classes=classes)


def half_width(draws: Float[np.ndarray, " draws"]) -> float:
    """By Student's t: draws may be few."""
    return float(stdtrit(len(draws) - 1, 0.975) * draws.std(ddof=1) / np.sqrt(len(draws)))


def unit(
    features: Float[np.ndarray, "samples features"], centre: Float[np.ndarray, " features"]
) -> Float[np.ndarray, "samples features"]:
    """Centred on the mean of the unlabelled training features, then of unit length (Y. Wang et al., "SimpleShot",
    2019, https://arxiv.org/abs/1911.04623, CL2N). The same for every subject, raw pixels included."""
    centred = features - centre
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def members(labels: Int64[np.ndarray, " samples"]) -> list[Int64[np.ndarray, " members"]]:
    """The samples of each class that there is, in the order of its number."""
    return [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]


def some_of_each(
    labels: Int64[np.ndarray, " samples"], count: int | float, random: np.random.Generator
) -> Int64[np.ndarray, " chosen"]:
    """So many labelled samples of each class, or that share of them, one at least; all of a class that has fewer."""
    chosen = []
    for one in members(labels):
        number = count if isinstance(count, int) else max(1, round(count * len(one)))
        chosen.append(random.permutation(one)[:number])
    return np.concatenate(chosen)
