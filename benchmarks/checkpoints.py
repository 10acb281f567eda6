"""Which number without labels ranks the checkpoints of a run as few-shot accuracy does: several methods, several seeds.

    python benchmarks/checkpoints.py builtin:mnist      # half an hour on two cores; writes into docs/evaluation.md

Each run is measured as `python -m darkmatter.rank_correlation` measures a user's own: all on the validation split, the test
split is not opened. Checkpoints of a run are not independent, so the spread is given over seeds.
"""

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import in_process
from darkmatter import cluster, rank_correlation
from darkmatter.rank_correlation import Correlation, Row
from data import replace_section
from objectives import MILD, MILD_METHODS, OPTIONS

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
METHODS = ("simclr", "vicreg", "byol", "mae")
BATCH, SIZE, WIDTH, CHECKPOINTS = 128, 28, 16, 18
SECTION = {"seed": 0, "few_shot": {"ways": [5], "shots": [5], "episodes": 600, "queries": 15}}
AUGMENT = {"image_size": SIZE, "channels": 1, "max_side": SIZE, "encoding": "png", "views": {"name": "glyphs"}}


def measure(folder: Path, method: str, seed: int, epochs: int) -> list[Row]:
    """Of each checkpoint of a run."""
    spec = in_process.specification(
        folder,
        {"name": method, method: OPTIONS[method]},
        {"name": "glyphs", "glyphs": MILD["glyphs"] if method in MILD_METHODS else {}},
        {"name": "small_conv", "small_conv": {"width": WIDTH}},
    )
    steps = epochs * (spec.num_samples // BATCH)
    every = steps // CHECKPOINTS
    config = in_process.pretraining(
        seed=seed, epochs=epochs, batch_size=BATCH, save_every=every, health_every=every, log_every=every
    )
    with tempfile.TemporaryDirectory() as name:
        checkpoints = in_process.train(folder, spec, config, Path(name), keep=10**6)
        return rank_correlation.measure(
            checkpoints, Path(name) / "model", folder / "shards", "5-way 5-shot", SECTION, in_process.place(Path(name))
        )


def spread(found: list[list[Correlation]], number: str, what: Callable[[Correlation], float | None]) -> str:
    """Mean over the seeds, and from where to where."""
    values = [what(one) for run in found for one in run if one.number == number]
    known = [one for one in values if one is not None]
    if not known:
        return "-"
    return f"{np.mean(known):+.2f} ({min(known):+.2f} to {max(known):+.2f})"


def tables(runs: dict[str, list[list[Row]]]) -> list[str]:
    found = {method: [rank_correlation.correlate(rows) for rows in some] for method, some in runs.items()}
    head = ["| number | " + " | ".join(f"`{method}`" for method in runs) + " |", "| --- |" + " --- |" * len(runs)]
    lines = []
    for title, what in (
        ("Over all checkpoints:", lambda one: one.rho),
        ("Over those of the later half, among which a choice is made:", lambda one: one.late),
    ):
        lines += [title, "", *head]
        for number in rank_correlation.CLAIMS:
            cells = " | ".join(spread(some, number, what) for some in found.values())
            lines.append(f"| {number} | {cells} |")
        lines.append("")
    lines += [
        "Few-shot accuracy, in percent, of the checkpoint that each would choose; mean over the seeds:",
        "",
        *head,
    ]
    for number in rank_correlation.CLAIMS:
        chosen = [
            np.mean([one.chosen for run in some for one in run if one.number == number]) for some in found.values()
        ]
        name = "step: the last one" if number == "step" else number
        lines.append(f"| {name} | " + " | ".join(f"{100 * one:.1f}" for one in chosen) + " |")
    best = [np.mean([max(row["few-shot"] for row in rows) for rows in some]) for some in runs.values()]
    return [*lines, "| *the best there was* | " + " | ".join(f"{100 * one:.1f}" for one in best) + " |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri", help="a source with labels, of grey glyphs")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    runs: dict[str, list[list[Row]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as name, cluster.session():
        folder = Path(name)
        in_process.prepare(arguments.uri, folder, AUGMENT, val=0.12, test=0.15)
        for seed in range(arguments.seeds):
            for method in METHODS:
                runs[method].append(measure(folder, method, seed, arguments.epochs))
                print(json.dumps({"method": method, "seed": seed, "checkpoints": runs[method][-1]}), flush=True)
    count = len(runs[METHODS[0]][0])
    about = (
        f"`python benchmarks/checkpoints.py {arguments.uri}`, {datetime.date.today()}, torch {torch.__version__}: "
        f"`small_conv` of width {WIDTH}, {arguments.epochs} epochs of batch {BATCH}, {count} checkpoints a run, "
        f"{arguments.seeds} seeds; Spearman's rank correlation with 5-way 5-shot accuracy (600 episodes, the same for all) "
        "on the validation split: mean over the seeds, and from the lowest to the highest. Positive means that the number "
        "says what its paper claims: a large margin, RankMe and LiDAR, an alpha near 1, a small alignment and uniformity."
    )
    replace_section(PAGE, "## Which number to trust", [about, "", *tables(runs)])


if __name__ == "__main__":
    main()
