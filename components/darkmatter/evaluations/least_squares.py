"""Few-shot by closed-form least squares: the protocol of big_vision's `fewshot_lsr`, with which L. Beyer, X. Zhai, A.
Kolesnikov report ViT (https://github.com/google-research/big_vision; A. Dosovitskiy et al., "An image is worth 16x16 words",
2020, https://arxiv.org/abs/2010.11929, section 4.1: a regularised least-squares regression to {-1, 1}^K).

From each class of the training split `shots` samples; each feature less its mean and by its standard deviation over those; a
constant feature of 100, so that the bias is hardly regularised; all classes, the whole test split. The interval is that over
`draws` of the samples.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int64
from pydantic import Field

from darkmatter.evaluations import Score, Skipped, Subject, of_draws, some_of_each
from darkmatter.params import Config as _Config

_BIAS = 100.0


class Config(_Config):
    shots: list[int] = Field(min_length=1)
    """Labelled samples a class; there 1, 5, 10, 25."""
    draws: int = Field(ge=2)
    """Of the labelled samples; there 3."""
    l2: float = Field(gt=0)
    """Weight of the regulariser; there 1024 for ImageNet."""


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    asked = subject.query_labels >= 0
    for shots in config.shots:
        name = f"{shots}-shot"
        if len(np.unique(subject.bank_labels[subject.bank_labels >= 0])) < 2 or not asked.any():
            yield Skipped(name=name, reason="there are no labels")
            continue
        random = np.random.default_rng([seed, shots])
        accuracies = np.empty(config.draws)
        for draw in range(config.draws):
            chosen = some_of_each(subject.bank_labels, shots, random)
            answers = predict(subject.bank[chosen], subject.bank_labels[chosen], subject.queries[asked], config.l2)
            accuracies[draw] = (answers == subject.query_labels[asked]).mean()
        yield of_draws(name, accuracies)


def predict(
    features: Float[np.ndarray, "samples features"],
    labels: Int64[np.ndarray, " samples"],
    queries: Float[np.ndarray, "queries features"],
    l2: float,
) -> Int64[np.ndarray, " queries"]:
    """The classes of the queries. float64."""
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64) + 1e-5
    known, asked = (
        np.pad((rows - mean) / deviation, ((0, 0), (0, 1)), constant_values=_BIAS) for rows in (features, queries)
    )
    targets = 2.0 * (labels[:, None] == np.arange(labels.max() + 1)) - 1
    if len(known) >= known.shape[1]:
        weights = np.linalg.solve(known.T @ known + l2 * np.eye(known.shape[1]), known.T @ targets)
    else:  # the same by a smaller system
        weights = known.T @ np.linalg.solve(known @ known.T + l2 * np.eye(len(known)), targets)
    return (asked @ weights).argmax(1)
