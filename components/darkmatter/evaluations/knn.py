"""Weighted k nearest neighbours: Z. Wu et al., "Unsupervised feature learning via non-parametric instance
discrimination" (2018), https://arxiv.org/abs/1805.01978, section 3.4, as DINO reports it.

The bank is the labelled training split, the queries the test split; features are centred and of unit length. A neighbour
at cosine s votes with weight exp(s / temperature).
"""

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from darkmatter.evaluations import Score, Skipped, Subject, half_width, unit
from darkmatter.params import Config as _Config


class Config(_Config):
    neighbours: int = Field(gt=0)
    """How many vote."""
    temperature: float = Field(gt=0)
    """The lower, the more the nearest decide; the paper has 0.07."""


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    known = subject.bank_labels >= 0
    asked = subject.query_labels >= 0
    name = f"top-1 k={config.neighbours}"
    if not known.any() or not asked.any():
        yield Skipped(name=name, reason="there are no labels")
        return
    centre = subject.bank.mean(0)
    bank, labels = unit(subject.bank[known], centre), subject.bank_labels[known]
    queries = unit(subject.queries[asked], centre)
    right = (
        np.concatenate(
            [_predict(part, bank, labels, config) for part in np.array_split(queries, 1 + len(queries) // 1024)]
        )
        == (subject.query_labels[asked])
    )
    right = right.astype(np.float64)
    yield Score(name=name, mean=float(right.mean()), ci95=half_width(right), draws=right)


def _predict(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, config: Config) -> np.ndarray:
    similarity = queries @ bank.T  # (Q, N)
    count = min(config.neighbours, similarity.shape[1])
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / config.temperature)  # (Q, count)
    votes = np.zeros((len(queries), labels.max() + 1))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[nearest]), weight)
    return votes.argmax(1)
