"""The stage: a model folder and the labelled splits -> scores with intervals, beside what the model must beat."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from darkmatter import cluster, contenders, evaluations, model, plugin
from darkmatter.changes import Change
from darkmatter.contenders import Contender
from darkmatter.evaluations import Score, Skipped, Subject
from darkmatter.features import Extraction, Wanted
from darkmatter.params import Config, ParamsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    tree: dict[str, Any]
    """evaluation -> protocol -> subject -> {mean, ci95}; beside the subjects `advantage` -> subject -> {mean, ci95}, the
    paired difference of the pretrained network to it. What could not be measured: protocol -> skipped -> reason."""
    energies: tuple[Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]]
    """Of compatible and of incompatible pairs, by the pretrained network."""
    subject: Subject
    """The pretrained network's features."""
    extraction: Extraction
    network: contenders.Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The section `evaluate` of params.yaml."""

    seed: int
    beside: list[str]
    """What else is scored: a model folder, or a network of timm."""
    chosen: list[tuple[str, Any, Config]]
    """Name, module and options of each evaluation."""

    @property
    def changes(self) -> list[Change]:
        """Of the pictures of the test split, each once."""
        asked = [module.wanted(options) for _, module, options in self.chosen if hasattr(module, "wanted")]
        return list(dict.fromkeys(change for some in asked for change in some))


def plan(section: Mapping[str, Any]) -> Plan:
    """
    Raises:
        ParamsError: a key that nothing reads, or a wrong value.
    """
    seed, beside = section.get("seed"), section.get("beside", [])
    if not isinstance(seed, int):
        raise ParamsError("evaluate.seed must be an integer")
    if not isinstance(beside, list) or not all(isinstance(one, str) for one in beside):
        raise ParamsError("evaluate.beside must be a list of model folders and networks of timm")
    chosen = []
    for name in section:
        if name not in ("seed", "beside"):
            module = plugin.load("evaluations", name, where="evaluate")
            chosen.append((name, module, plugin.options(module, section, where="evaluate")))
    return Plan(seed=seed, beside=beside, chosen=chosen)


def evaluate(
    model_folder: Path,
    shards_folder: Path,
    section: Mapping[str, Any],
    *,
    champion: Contender | None,
    place: cluster.PlaceConfig,
) -> Results:
    """Scores the model, the same network untrained, raw pixels, a colour histogram, the registered champion if there is one,
    and what `evaluate.beside` names.

    Args:
        model_folder: what `pretrain` wrote.
        shards_folder: what `ingest` wrote; its test split is read here and nowhere else.
        section: `evaluate` of params.yaml.
        champion: of the registry.
        place: where features are computed and kept.
    """
    chosen = plan(section)
    _, spec, _ = model.load(model_folder)
    networks = [
        contenders.Network("pretrained", model_folder.resolve()),
        contenders.Network("untrained", model_folder.resolve(), trained=False),
    ]
    others: list[Contender] = [contenders.Pixels(), contenders.Histogram()]
    others += [champion] if champion else []
    others += [contenders.beside(one, spec.images) for one in chosen.beside]
    with cluster.session(place):
        gpu = place.gpu and cluster.has_gpus_for_tasks()
        extraction = Extraction(folder=shards_folder, spec=spec, seed=chosen.seed, cache=place.features, gpu=gpu)
        subjects = _subjects(extraction, networks, others, chosen.changes)
        names = [name for name, _, _ in chosen.chosen]
        sent = [cluster.share(one) for one in subjects]  # once, not with each task
        tasks = [(name, section, one, chosen.seed) for name in names for one in sent]
        answers = list(cluster.map_tasks(_score, tasks, "scoring", total=len(tasks)))
    labels = subjects[0].query_labels
    tree: dict[str, Any] = {
        "model_sha256": model.digest(model_folder),
        "test_samples": len(labels),
        "labelled": int((labels >= 0).sum()),
    }
    for number, name in enumerate(names):
        found = answers[number * len(subjects) : (number + 1) * len(subjects)]
        tree[name] = _tabulate({one.name: scores for one, scores in zip(subjects, found, strict=True)})
    return Results(
        tree=tree,
        energies=(np.asarray(subjects[0].compatible), np.asarray(subjects[0].incompatible)),
        subject=subjects[0],
        extraction=extraction,
        network=networks[0],
    )


def _subjects(
    extraction: Extraction, networks: Sequence[Contender], others: Sequence[Contender], changes: Sequence[Change]
) -> list[Subject]:
    """Networks have an objective: its energy, its views, its patches."""
    everyone = [*networks, *others]
    plain = [Wanted(one) for one in everyone]
    of_test = [Wanted(one, "features", change) for one in everyone for change in changes]
    of_test += [Wanted(one, kind) for one in networks for kind in ("energies", "views")]
    of_test += [Wanted(one, "similarity", change) for one in networks for change in changes if change.name == "paste"]
    bank = extraction.arrays("train", plain)
    validation = extraction.arrays("val", plain) if extraction.manifest.samples("val") else {}
    test = extraction.arrays("test", [*plain, *of_test])
    labels = {split: extraction.labels(split) for split in ("train", "val", "test")}
    subjects = []
    for one in everyone:
        energies = test.get(Wanted(one, "energies"))
        subjects.append(
            Subject(
                name=one.name,
                bank=bank[Wanted(one)],
                bank_labels=labels["train"],
                validation=validation.get(Wanted(one), bank[Wanted(one)][:0]),
                validation_labels=labels["val"],
                queries=test[Wanted(one)],
                query_labels=labels["test"],
                changed={change: test[Wanted(one, "features", change)] for change in changes},
                views=test.get(Wanted(one, "views")),
                compatible=None if energies is None else energies[:, 0],
                incompatible=None if energies is None else energies[:, 1],
                similarity=test.get(Wanted(one, "similarity", Change("paste"))),
            )
        )
    return subjects


def _score(name: str, section: Mapping[str, Any], subject: Subject, seed: int) -> list[Score | Skipped]:
    """One evaluation of one subject, in a worker."""
    torch.set_num_threads(1)  # there is one task a core
    module = plugin.load("evaluations", name, where="evaluate")
    return list(module.scores(plugin.options(module, section, where="evaluate"), subject, seed=seed))


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
