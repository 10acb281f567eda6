"""Search by example: each test sample asks for the nearest training samples by cosine, on features centred and of unit
length; what has its class is right.

Mean average precision over the whole ranking (C. Manning et al., "Introduction to information retrieval", 2008, chapter
8.4), and recall@k as metric learning has it: how often one of the k nearest is right (H. Oh Song et al., "Deep metric
learning via lifted structured feature embedding", 2016, https://arxiv.org/abs/1511.06452, section 6).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from darkmatter.evaluations import Score, Skipped, Subject, of_draws, unit
from darkmatter.params import Config as _Config

_AT_A_TIME = 256  # queries


class Config(_Config):
    nearest: list[int] = Field(min_length=1)
    """For each k a recall@k."""


def scores(config: Config, subject: Subject, *, seed: int) -> Iterator[Score | Skipped]:
    names = ["mAP", *(f"recall@{k}" for k in config.nearest)]
    known = subject.bank_labels >= 0
    asked = np.isin(subject.query_labels, subject.bank_labels[known])
    if not asked.any():
        yield from (Skipped(name=name, reason="there are no labels") for name in names)
        return
    centre = subject.bank.mean(0)
    bank, labels = unit(subject.bank[known], centre), subject.bank_labels[known]
    queries, answers = unit(subject.queries[asked], centre), subject.query_labels[asked]
    rows = []
    for part in np.array_split(np.arange(len(queries)), 1 + len(queries) // _AT_A_TIME):
        order = np.argsort(-(queries[part] @ bank.T), axis=1, kind="stable")
        right = labels[order] == answers[part, None]
        rows.append(
            np.column_stack([average_precision(right), *(right[:, :k].any(1).astype(float) for k in config.nearest)])
        )
    for name, draws in zip(names, np.concatenate(rows).T, strict=True):
        yield of_draws(name, draws)


def average_precision(right: Bool[np.ndarray, "queries ranks"]) -> Float[np.ndarray, " queries"]:
    """Of each ranking: the mean, over the places of what is right, of the precision up to there."""
    places = np.arange(1, right.shape[1] + 1)
    precision = right.cumsum(1) / places
    return (precision * right).sum(1) / right.sum(1)
