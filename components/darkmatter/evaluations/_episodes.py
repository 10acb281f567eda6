"""Few-shot episodes: the same for all subjects and, by their names, for all evaluations."""

import numpy as np
import torch
from jaxtyping import Float, Int64

from darkmatter.evaluations import _logistic, members

_AT_A_TIME = 100  # episodes


def draw(
    labels: Int64[np.ndarray, " samples"], ways: int | str, shots: int, queries: int, episodes: int, seed: int
) -> Int64[np.ndarray, "episodes ways drawn"] | str:
    """The samples of each episode, `shots` to learn from and then `queries`; or why there can be none."""
    least = shots + queries
    classes = [some for some in members(labels) if len(some) >= least]
    count = len(classes) if ways == "all" else int(ways)
    if len(classes) < max(2, count):
        return f"{len(classes)} classes have {least} labelled test samples"
    random = np.random.default_rng([seed, count, shots])
    picks = np.empty((episodes, count, least), np.int64)
    for episode in picks:
        for row, index in enumerate(random.choice(len(classes), count, replace=False)):
            episode[row] = random.choice(classes[index], least, replace=False)
    return picks


def accuracy(
    learn: Float[np.ndarray, "samples features"],
    ask: Float[np.ndarray, "samples features"],
    picks: Int64[np.ndarray, "episodes ways drawn"],
    shots: int,
    classifier: str,
) -> Float[np.ndarray, " episodes"]:
    """Of each episode.

    Args:
        learn: features to learn from.
        ask: of the same samples, to classify; the same, unless those pictures were changed.
        picks: as `draw` gives them.
        shots: how many of each class are learned from.
        classifier: `centroid` or `logistic`.
    """
    predict = _by_centroid if classifier == "centroid" else _by_regression
    right = []
    for some in np.array_split(picks, 1 + len(picks) // _AT_A_TIME):
        answers = predict(learn[some[:, :, :shots]], ask[some[:, :, shots:]])  # (episodes, ways, queries)
        right.append((answers == np.arange(picks.shape[1])[:, None]).mean((1, 2)))
    return np.concatenate(right)


def _by_centroid(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(E, ways, shots, D), (E, ways, queries, D) -> (E, ways, queries)."""
    centroids = known.mean(2)  # (E, ways, D)
    products = np.einsum("ewqd,ecd->ewqc", asked, centroids, optimize=True)
    # |q - c|^2 = |q|^2 - 2 q.c + |c|^2; the first does not decide.
    return (np.square(centroids).sum(2)[:, None, None] - 2 * products).argmin(3)


def _by_regression(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    episodes, ways, shots, width = known.shape
    labels = torch.arange(ways).repeat_interleave(shots).expand(episodes, -1)
    linear = _logistic.fit(torch.from_numpy(known).reshape(episodes, ways * shots, width), labels, ways, 1.0)
    asked_rows = torch.from_numpy(asked).double().reshape(episodes, -1, width)
    return linear.predict(asked_rows).view(episodes, ways, -1).numpy()
