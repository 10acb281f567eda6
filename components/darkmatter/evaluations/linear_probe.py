"""Logistic regression on fixed features, from few labels to all of them: the protocol of DINOv2 and DINOv3.

Features are taken as they are, the problem is scikit-learn's (L2, L-BFGS), its strength C is the one of `strengths` values
from 1e-6 to 1e5 that is best on the validation split. With all labels the answer is learned from training and validation
split together. M. Oquab et al., "DINOv2" (2023), https://arxiv.org/abs/2304.07193, section 7.1; O. Simeoni et al., "DINOv3"
(2025), https://arxiv.org/abs/2508.10104: `strengths` 45, `per_class` with several `draws`.

With all labels the interval is that over test samples. Else it is that over draws of the labelled samples, each scored on
the whole test split: it says how much depends on which samples were labelled, not how large the test split is.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field

from darkmatter.evaluations import Score, Skipped, Subject, _logistic, of_draws, some_of_each
from darkmatter.params import Config as _Config

_PATIENCE = 3


class Config(_Config):
    shares: list[float] = Field(default=[])
    """Parts of the labelled training samples, 0 to 1, drawn from each class; 1 is all of them."""
    per_class: list[int] = Field(default=[])
    """Labelled samples of each class."""
    draws: int = Field(ge=2)
    """How often labelled samples are drawn anew."""
    strengths: int = Field(ge=2)
    """How many values of C are tried."""


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    counts: list[int | float] = [*config.shares, *config.per_class]
    for count in counts:
        name = f"{count:.4g} of labels" if isinstance(count, float) else f"{count} a class"
        reason = _reason(subject)
        if reason:
            yield Skipped(name=name, reason=reason)
        elif count == 1.0 and isinstance(count, float):
            yield of_draws(name, _with_all(subject, config.strengths).astype(np.float64))
        else:
            random = np.random.default_rng([seed, *str(count).encode()])
            chosen = np.stack([some_of_each(subject.bank_labels, count, random) for _ in range(config.draws)])
            yield of_draws(name, _right(subject, chosen, config.strengths).mean(1))


def _reason(subject: Subject) -> str:
    if len(np.unique(subject.bank_labels[subject.bank_labels >= 0])) < 2 or not (subject.query_labels >= 0).any():
        return "there are no labels"
    if not (subject.validation_labels >= 0).any():
        return "the validation split, on which C is chosen, has no labels"
    return ""


def _right(
    subject: Subject, chosen: Int64[np.ndarray, "draws samples"], strengths: int
) -> Float[np.ndarray, "draws queries"]:
    """Whether each labelled test sample is told, by each draw's classifier."""
    asked = subject.query_labels >= 0
    best = np.full(len(chosen), -1.0)
    right = np.zeros((len(chosen), int(asked.sum())))
    for _, linear, found in _path(subject, chosen, strengths):
        better = found > best  # of equals the weaker
        best = np.where(better, found, best)
        right[better] = (_predict(linear, subject.queries[asked]) == subject.query_labels[asked])[better]
    return right


def _with_all(subject: Subject, strengths: int) -> Bool[np.ndarray, " queries"]:
    known, judged = np.flatnonzero(subject.bank_labels >= 0), subject.validation_labels >= 0
    strength, start, _ = max(_path(subject, known[None], strengths), key=lambda one: (one[2][0], -one[0]))
    features = np.concatenate([subject.bank[known], subject.validation[judged]])
    labels = np.concatenate([subject.bank_labels[known], subject.validation_labels[judged]])
    linear = _logistic.fit(
        torch.from_numpy(features)[None], torch.from_numpy(labels)[None], _classes(subject), strength, start=start
    )
    asked = subject.query_labels >= 0
    return (_predict(linear, subject.queries[asked]) == subject.query_labels[asked])[0]


def _path(
    subject: Subject, chosen: Int64[np.ndarray, "draws samples"], strengths: int
) -> Iterator[tuple[float, _logistic.Linear, Float[np.ndarray, " draws"]]]:
    """For rising C, each from the answer before: C, the classifiers, their accuracy on the validation split. Ends when that
    has been below its best `_PATIENCE` times: what follows fits noise, and takes the longest."""
    judged = subject.validation_labels >= 0
    features, labels = torch.from_numpy(subject.bank[chosen]), torch.from_numpy(subject.bank_labels[chosen])
    linear, best, worse = None, 0.0, 0
    for strength in strengths_of(strengths).tolist():
        linear = _logistic.fit(features, labels, _classes(subject), strength, start=linear)
        found = (_predict(linear, subject.validation[judged]) == subject.validation_labels[judged]).mean(1)
        yield strength, linear, found
        best = max(best, found.mean())
        worse = worse + 1 if found.mean() < best else 0
        if worse == _PATIENCE:
            return


def _classes(subject: Subject) -> int:
    return 1 + int(max(subject.bank_labels.max(), subject.query_labels.max(), subject.validation_labels.max()))


def strengths_of(count: int) -> Float[np.ndarray, " strengths"]:
    """Values of C, DINOv2's if they are 45."""
    return 10 ** np.linspace(-6, 5, count)


def _predict(linear: _logistic.Linear, features: np.ndarray) -> np.ndarray:
    return linear.predict(torch.from_numpy(features).double()[None]).numpy()
