"""The stage: a model folder and the labelled splits -> scores with intervals, beside what the model must beat."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from tqdm import tqdm

from darkmatter import evaluations, health, images, model, plugin, shards, training_set
from darkmatter.augmentations import Views
from darkmatter.evaluations import Score, Skipped, Subject
from darkmatter.objectives import Objective
from darkmatter.params import Config, ParamsError
from darkmatter.stream import permutation

_BATCH = 256
Pictures = UInt8[np.ndarray, "batch channels size size"]
Embed = Callable[[Pictures, Sequence[bytes]], Float[np.ndarray, "batch features"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    tree: dict[str, Any]
    """evaluation -> protocol -> subject -> {mean, ci95}; beside the subjects `advantage` -> subject -> {mean, ci95}, the
    paired difference of the pretrained network to it. What could not be measured: protocol -> skipped -> reason."""
    energies: tuple[Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]]
    """Of compatible and of incompatible pairs, by the pretrained network."""


def plan(section: Mapping[str, Any]) -> tuple[int, list[tuple[str, Any, Config]]]:
    """The section `evaluate` of params.yaml: the seed, and (name, module, options) of each evaluation it names."""
    if not isinstance(section.get("seed"), int):
        raise ParamsError("evaluate.seed must be an integer")
    chosen = []
    for name in section:
        if name != "seed":
            module = plugin.load("evaluations", name, where="evaluate")
            chosen.append((name, module, plugin.options(module, section, where="evaluate")))
    return section["seed"], chosen


def evaluate(
    model_folder: Path,
    shards_folder: Path,
    section: Mapping[str, Any],
    *,
    champion: Callable[[Sequence[bytes]], Float[np.ndarray, "batch features"]] | None,
) -> Results:
    """Scores the model, the same network untrained, raw pixels and, if there is one, the registered champion.

    Args:
        model_folder: what `pretrain` wrote.
        shards_folder: what `ingest` wrote; its test split is read here and nowhere else.
        section: `evaluate` of params.yaml.
        champion: image files to embeddings.
    """
    seed, chosen = plan(section)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, spec, provenance = model.load(model_folder)
    untrained = model.build(spec, seed=provenance["seed"]).to(device)
    trained = trained.to(device)
    views = training_set.choose_views(spec.views, spec.images)
    embedders: dict[str, Embed] = {
        "pretrained": lambda pictures, _: embed(trained, pictures, device),
        "untrained": lambda pictures, _: embed(untrained, pictures, device),
        "pixels": lambda pictures, _: pictures.reshape(len(pictures), -1).astype(np.float32) / 255,
    }
    if champion is not None:
        embedders["champion"] = lambda _, contents: champion(contents)

    manifest = shards.Manifest.load(shards_folder)
    bank, bank_labels = features(shards_folder, manifest, "train", embedders, spec)
    queries, query_labels = features(shards_folder, manifest, "test", embedders, spec)
    networks = {"pretrained": trained, "untrained": untrained}
    energies = _energies(shards_folder, manifest, views, spec, networks, seed, device)
    subjects = [
        Subject(
            name=name,
            bank=bank[name],
            bank_labels=bank_labels,
            queries=queries[name],
            query_labels=query_labels,
            compatible=energies[name][0] if name in energies else None,
            incompatible=energies[name][1] if name in energies else None,
        )
        for name in embedders
    ]
    tree: dict[str, Any] = {
        "model_sha256": model.digest(model_folder),
        "test_samples": len(query_labels),
        "labelled": int((query_labels >= 0).sum()),
    }
    for name, module, options in chosen:
        tree[name] = _tabulate({one.name: list(module.scores(options, one, seed=seed)) for one in subjects})
    return Results(tree=tree, energies=energies["pretrained"])


def _tabulate(found: Mapping[str, Sequence[Score | Skipped]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    reference = {score.name: score for score in found["pretrained"] if isinstance(score, Score)}
    for subject, scores in found.items():
        for score in scores:
            row = table.setdefault(score.name, {})
            if isinstance(score, Skipped):
                row["skipped"] = score.reason
                continue
            row[subject] = _entry(score)
            ours = reference.get(score.name)
            if subject != "pretrained" and ours is not None and ours.draws is not None and score.draws is not None:
                difference = evaluations.of_draws(score.name, ours.draws - score.draws)
                row.setdefault("advantage", {})[subject] = _entry(difference)
    return table


def _entry(score: Score) -> dict[str, Any]:
    entry: dict[str, Any] = {"mean": round(score.mean, 6), "ci95": None if score.ci95 is None else round(score.ci95, 6)}
    return entry if score.classes is None else {**entry, "classes": score.classes}


def embed(objective: Objective, pictures: Pictures, device: torch.device) -> Float[np.ndarray, "batch features"]:
    """What downstream teams would get for these pictures."""
    return health.embeddings(objective, torch.from_numpy(pictures).to(device).float() / 255).numpy()


def features(
    folder: Path, manifest: shards.Manifest, split: shards.Split, embedders: Mapping[str, Embed], spec: model.ModelSpec
) -> tuple[dict[str, Float[np.ndarray, "samples features"]], Int64[np.ndarray, " samples"]]:
    """Features of every subject, decoded once; labels with -1 where there is none."""
    parts: dict[str, list[Any]] = {name: [] for name in embedders}
    with shards.Reader(folder, manifest, split) as reader:
        if not len(reader):
            raise ValueError(f"the {split} split is empty; raise ingest.{split}_fraction or give more data")
        for chosen in tqdm(_batches(np.arange(len(reader))), desc=f"embedding {split}", unit="batch", mininterval=1.0):
            contents = [reader.read(index) for index in chosen.tolist()]
            pictures = np.stack(
                [
                    images.fit(images.decode(one), size=spec.images.image_size, channels=spec.images.channels)
                    for one in contents
                ]
            )
            for name, embedder in embedders.items():
                parts[name].append(embedder(pictures, contents))
        labels = reader.labels
    return {name: np.concatenate(some) for name, some in parts.items()}, labels


def _energies(
    folder: Path,
    manifest: shards.Manifest,
    views: Views,
    spec: model.ModelSpec,
    objectives: Mapping[str, Objective],
    seed: int,
    device: torch.device,
) -> dict[str, tuple[Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]]]:
    """Of each test sample: the energy of two of its views, and of one of them with a view of another sample."""
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in objectives}
    settings = spec.images
    with shards.Reader(folder, manifest, "test") as reader:
        order = permutation(seed, 0, len(reader))  # shuffled: neighbours in a source sorted by class are alike
        for chosen in _batches(order):
            prepared = [
                images.encode(
                    images.decode(one), max_side=settings.max_side, channels=settings.channels, encoding="png"
                )
                for one in map(reader.read, chosen.tolist())
            ]
            first, second = (view.to(device) for view in views(prepared, chosen, seed=seed, epoch=0)[:2])
            for name, objective in objectives.items():
                compatible, incompatible = health.pair_energies(objective, first, second)
                parts[name].append((compatible.float().cpu().numpy(), incompatible.float().cpu().numpy()))
    return {
        name: (np.concatenate([one for one, _ in some]), np.concatenate([two for _, two in some]))
        for name, some in parts.items()
    }


def _batches(indices: Int64[np.ndarray, " samples"]) -> list[Int64[np.ndarray, " batch"]]:
    """Never a batch of one, unless there is one in all: a pair needs a second sample."""
    return np.array_split(indices, math.ceil(len(indices) / _BATCH))
