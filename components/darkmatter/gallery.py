"""What a person wants to see of a representation: who is near whom, a map of all, and what patches are taken for.

Of samples that were not trained on: those of the validation split, or without one of the training split.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64

from darkmatter import contenders, health, pictures, training_set
from darkmatter.evaluations import Subject, unit
from darkmatter.features import Extraction
from darkmatter.stream import permutation

_QUERIES, _NEAREST, _ON_THE_MAP, _PATCHED = 8, 7, 600, 8


def draw(extraction: Extraction, network: contenders.Network, subject: Subject, folder: Path) -> None:
    """Writes neighbours.png, map.png and patches.png.

    Args:
        extraction: of the shards; reads a few hundred of their pictures.
        network: the pretrained one.
        subject: its features.
        folder: for the pictures.
    """
    held_out = training_set.held_out_split(extraction.manifest)
    shown = subject.validation if held_out == "val" else subject.bank
    order = permutation(extraction.seed, 0, len(shown))
    queries = order[:_QUERIES].tolist()
    nearest = neighbours(shown[queries], subject.bank, _NEAREST + 1)
    rows = []
    for query, row in zip(queries, nearest, strict=True):
        others = [one for one in row.tolist() if held_out == "val" or one != query][:_NEAREST]
        rows.append([*extraction.pictures(held_out, [query]), *extraction.pictures("train", others)])
    pictures.neighbours(rows, folder / "neighbours.png")

    placed = order[:_ON_THE_MAP]
    pictures.map_of(places(shown[placed]), list(extraction.pictures(held_out, placed.tolist())), folder / "map.png")

    some = extraction.pictures(held_out, order[:_PATCHED].tolist())
    opened = network.open(torch.device("cpu"))
    with torch.no_grad(), health.evaluating(opened.objective):
        tokens = opened.objective.backbone.patches(opened.tensor(some)).float().numpy()
    pictures.patches(list(some), colours(tokens), folder / "patches.png")


def neighbours(
    queries: Float[np.ndarray, "queries features"], bank: Float[np.ndarray, "bank features"], count: int
) -> Int64[np.ndarray, "queries count"]:
    """The nearest of the bank by cosine, centred on it, nearest first."""
    centre = bank.mean(0)
    similarity = unit(queries, centre) @ unit(bank, centre).T
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]


def places(embeddings: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, "samples 2"]:
    """On a map where those lie together that are alike: t-SNE of the first 50 principal components, in [0, 1].

    L. van der Maaten, G. Hinton, "Visualizing data using t-SNE" (2008). How far groups are from each other means nothing.
    """
    from sklearn.manifold import TSNE

    centred = embeddings - embeddings.mean(0)
    left, singular, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    components = left[:, :50] * singular[:50]
    if len(components) < 10:
        return _scaled(np.pad(components, ((0, 0), (0, 2)))[:, :2])
    perplexity = min(30.0, (len(components) - 1) / 3)
    return _scaled(TSNE(init="pca", perplexity=perplexity, random_state=0, n_jobs=1).fit_transform(components))


def colours(tokens: Float[np.ndarray, "images patches features"]) -> Float[np.ndarray, "images grid grid 3"]:
    """The first three principal components of the features of patches, over all images, as red, green and blue."""
    count, patches, _ = tokens.shape
    rows = tokens.reshape(count * patches, -1).astype(np.float64)
    left, singular, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    components = np.pad(left * singular, ((0, 0), (0, 3)))[:, :3]
    low, high = np.quantile(components, [0.02, 0.98], axis=0)
    grid = round(patches**0.5)
    return np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(count, grid, grid, 3)


def _scaled(points: np.ndarray) -> np.ndarray:
    low, high = points.min(0), points.max(0)
    return (points - low) / np.maximum(high - low, 1e-12)
