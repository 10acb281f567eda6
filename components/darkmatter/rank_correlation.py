"""`python -m darkmatter.rank_correlation`: which number without labels goes with few-shot accuracy, over the checkpoints
of a run?

All is measured on the validation split, whose labels decide nothing but this table: no checkpoint is chosen by it, and the
test split is not opened. A run shows it if its checkpoints were kept: `place.keep_checkpoints`.

A number is worth more than nothing only if it ranks checkpoints better than their step does: few-shot accuracy mostly rises
while a run goes on, and so does whatever else rises. Checkpoints of one run are not independent, so that the p-value, which
takes them to be, is too small; several runs say more (benchmarks/checkpoints.py).
"""

import argparse
import dataclasses
import math
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from darkmatter import cluster, console, contenders, evaluate, files, model, params
from darkmatter.evaluations import Skipped, Subject
from darkmatter.features import Extraction, Wanted
from darkmatter.training.checkpoint import Checkpoints
from darkmatter.training.run import Run

Row = dict[str, float]

#: How large a number must be made to say "this checkpoint is better", by what its paper says of it.
CLAIMS: dict[str, Callable[[float], float]] = {
    "step": lambda step: step,
    "energy margin": lambda area: area,
    "RankMe": lambda rank: rank,
    "LiDAR": lambda rank: rank,
    "alpha-ReQ": lambda alpha: -abs(alpha - 1),
    "uniformity": lambda uniformity: -uniformity,
    "alignment": lambda alignment: -alignment,
}
_FEWEST = 5  # checkpoints; of four, orders are equal by chance too often to say anything
_SCORED = {
    "energy_margin": {"auroc": "energy margin"},
    "rankme": {"rankme": "RankMe"},
    "label_free": {"lidar": "LiDAR", "alpha_req": "alpha-ReQ", "uniformity": "uniformity", "alignment": "alignment"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correlation:
    """Of a number with few-shot accuracy over the checkpoints of a run; positive where it says what it claims."""

    number: str
    rho: float | None
    """Spearman's rank correlation over all of them; None where the number is the same for all."""
    p: float | None
    """Of independent checkpoints; too small for those of a run."""
    late: float | None
    """As rho, over the later half of the run only, where a choice is made."""
    chosen: float
    """Few-shot accuracy of the checkpoint that it would choose."""


def measure(
    checkpoints: Checkpoints,
    model_folder: Path,
    shards_folder: Path,
    protocol: str,
    section: Mapping[str, Any],
    place: cluster.PlaceConfig,
) -> list[Row]:
    """Every number of each checkpoint, and its few-shot accuracy as `few-shot`.

    Args:
        checkpoints: of the run.
        model_folder: what the run exported.
        shards_folder: what `ingest` wrote; of its splits only the validation split is read.
        protocol: few-shot, as `5-way 5-shot`.
        section: `evaluate` of params.yaml, for its seed and its episodes.
        place: where features are computed and kept.

    Raises:
        ValueError: too few checkpoints were kept, or the validation split does not allow the protocol.
    """
    steps = checkpoints.steps()
    if len(steps) < _FEWEST:
        raise ValueError(
            f"{checkpoints.address} has {len(steps)} checkpoints, {_FEWEST} are needed at least: set "
            "place.keep_checkpoints to 1000 (and perhaps a smaller pretrain.save_every), remove that folder, and train "
            "again: dvc repro --force pretrain"
        )
    plan = _plan(protocol, section)
    objective, spec, provenance = model.load(model_folder)
    extraction = Extraction(folder=shards_folder, spec=spec, seed=plan.seed, cache=place.features, gpu=place.gpu)
    if not extraction.manifest.samples("val"):
        raise ValueError("the val split is empty; raise ingest.val_fraction")
    with tempfile.TemporaryDirectory() as scratch, cluster.session():
        wanted = {}
        for step in steps:
            objective.load_state_dict(checkpoints.load(step)["objective"])
            model.save(Path(scratch, str(step)), objective, spec, {"seed": provenance["seed"]})
            network = contenders.Network(f"step {step}", Path(scratch, str(step)))
            wanted[step] = [Wanted(network), Wanted(network, "views"), Wanted(network, "energies")]
        arrays = extraction.arrays("val", [one for some in wanted.values() for one in some])
    labels = extraction.labels("val")
    return [_row(step, plan, labels, [arrays[one] for one in some]) for step, some in wanted.items()]


def _plan(protocol: str, section: Mapping[str, Any]) -> evaluate.Plan:
    """Health, and the one protocol, with the episodes of params.yaml."""
    form = re.fullmatch(r"(all|\d+)-way (\d+)-shot( logistic)?", protocol)
    if form is None or "few_shot" not in section:
        raise ValueError(f"{protocol!r} is no protocol of evaluate.few_shot; write 5-way 5-shot")
    ways = form[1] if form[1] == "all" else int(form[1])
    classifier = "logistic" if form[3] else "centroid"
    few_shot = {**section["few_shot"], "ways": [ways], "shots": [int(form[2])], "classifiers": [classifier]}
    return evaluate.plan({"seed": section["seed"], "few_shot": few_shot, **{name: {} for name in _SCORED}})


def _row(step: int, plan: evaluate.Plan, labels: np.ndarray, arrays: Sequence[np.ndarray]) -> Row:
    features, views, energies = arrays
    subject = Subject(
        name=f"step {step}",
        bank=features,  # for its mean only
        bank_labels=labels,
        validation=features,
        validation_labels=labels,
        queries=features,
        query_labels=labels,
        views=views,
        compatible=energies[:, 0],
        incompatible=energies[:, 1],
    )
    row: Row = {"step": step}
    for name, module, options in plan.chosen:
        for score in module.scores(options, subject, seed=plan.seed):
            if isinstance(score, Skipped):
                raise ValueError(f"{score.name} on the validation split: {score.reason}; raise ingest.val_fraction")
            row[_SCORED[name][score.name] if name in _SCORED else "few-shot"] = score.mean
    return row


def correlate(rows: Sequence[Row]) -> list[Correlation]:
    """What `measure` found, as a table: a line for each number."""
    accuracy = np.array([row["few-shot"] for row in rows])
    late = np.array([row["step"] for row in rows]) > rows[-1]["step"] / 2
    found = []
    for number, claim in CLAIMS.items():
        values = np.array([claim(row[number]) for row in rows])
        rho, p = _spearman(values, accuracy)
        best = len(values) - 1 - int(np.argmax(values[::-1]))  # the last of equals
        found.append(
            Correlation(
                number=number,
                rho=rho,
                p=p,
                late=_spearman(values[late], accuracy[late])[0],
                chosen=float(accuracy[best]),
            )
        )
    return found


def _spearman(values: np.ndarray, accuracy: np.ndarray) -> tuple[float | None, float | None]:
    """None where one of the two does not change, or there are too few."""
    if len(values) < _FEWEST or len(np.unique(values)) == 1 or len(np.unique(accuracy)) == 1:
        return None, None
    found = stats.spearmanr(values, accuracy)
    return float(found.statistic), float(found.pvalue)


def table(rows: Sequence[Row]) -> list[str]:
    """For people."""
    best = max(row["few-shot"] for row in rows)
    lines = [
        "| number | rank correlation | p | later half | few-shot of its choice |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in correlate(rows):
        p = "-" if one.p is None else f"{one.p:.1g}"
        lines.append(f"| {one.number} | {_signed(one.rho)} | {p} | {_signed(one.late)} | {100 * one.chosen:.1f} % |")
    return [*lines, f"| *the best of {len(rows)} checkpoints* | | | | {100 * best:.1f} % |"]


def _signed(rho: float | None) -> str:
    return "-" if rho is None or math.isnan(rho) else f"{rho:+.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The run that made models/backbone, with the params of this folder."""
    parser = argparse.ArgumentParser(prog="python -m darkmatter.rank_correlation", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON with every number of each checkpoint")
    chosen = parser.parse_args(arguments)
    tree, folder = params.read(), Path("models/backbone")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    if not folder.is_dir():
        raise ValueError(f"there is no {folder}; train first: dvc repro")
    run = Run.of(model.load(folder)[2]["fingerprint"], place)
    protocol = str(tree["register"]["protocol"])
    rows = measure(run.checkpoints, folder, Path("data/shards"), protocol, tree["evaluate"], place)
    if chosen.out:
        found = [dataclasses.asdict(one) for one in correlate(rows)]
        kept = [{name: value if math.isfinite(value) else None for name, value in row.items()} for row in rows]
        files.write_json(chosen.out, {"protocol": protocol, "checkpoints": kept, "numbers": found})
    print(f"{protocol} on the validation split, checkpoints in {run.address}\n", *table(rows), sep="\n")


if __name__ == "__main__":
    console.run(lambda: main(sys.argv[1:]))
