"""What Ray costs, and what a second worker brings: the same training under Ray and under torchrun, with one and two workers.

    make bench-workers        # twenty minutes on two cores; writes into docs/performance.md

All is the stage `pretrain` as it is; for torchrun only the line that starts the workers is another. Each worker has one core
and one thread. The speed is that of the history's rows, without the first, which has the start in it.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import in_process
from darkmatter import cluster, shards
from darkmatter.training import history, pretrain
from data import PAGE, replace_section
from training import prepare, specification

ROWS = {32: 4, 128: 1}  # steps a row of the history, by images a step
SHARDS = 16  # of 64 images; one epoch
SIDES = {"Ray, 2 workers": (2, False), "torchrun, 2 workers": (2, True), "Ray, 1 worker": (1, False)}


def speed(folder: Path, batch: int, workers: int, torchrun: bool) -> float:
    """Images a second, once it runs."""
    with tempfile.TemporaryDirectory() as name:
        place = in_process.place(Path(name), workers=workers)
        config = in_process.pretraining(
            seed=0, epochs=1, batch_size=batch, learning_rate=0.0001, warmup_epochs=0, log_every=ROWS[batch]
        )
        launcher = under_torchrun if torchrun else cluster.train
        with mock.patch.object(cluster, "train", launcher):
            pretrain.pretrain(
                folder / "train",
                specification("simclr", "resnet18", folder),
                config,
                place,
                out=Path(name) / "model",
                plot=Path(name) / "history.csv",
            )
        (run,) = Path(name).glob("storage/pretrain-*")
        # The last row has a look at the health in it.
        return statistics.median(row["images_per_second"] for row in history.read(str(run))[1:-1])


def under_torchrun(
    function: Callable[..., None], job: dict[str, Any], place: cluster.PlaceConfig, *, name: str
) -> None:
    """Stands for `cluster.train`."""
    least, _ = place.worker_range
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps((function, job)))
        file.flush()
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={least}", __file__]
        environment = {**os.environ, **cluster.MALLOC, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command, "--worker", file.name], check=True, env=environment)


def work(file: str) -> None:
    """What torchrun starts."""
    function, job = pickle.loads(Path(file).read_bytes())
    torch.distributed.init_process_group("gloo")
    try:
        function(job, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder:/data/photos, or another source of colour images")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[int, dict[str, list[float]]] = {batch: {side: [] for side in SIDES} for batch in ROWS}
    with tempfile.TemporaryDirectory() as name, cluster.session():
        folder = Path(name)
        prepare(arguments.images, folder)
        manifest = shards.Manifest.load(folder / "train")
        dataclasses.replace(manifest, shards=manifest.shards[:SHARDS]).save(folder / "train")
        for _ in range(arguments.rounds):
            for batch, sides in found.items():
                for side, (workers, torchrun) in SIDES.items():
                    sides[side].append(speed(folder, batch, workers, torchrun))
                print(json.dumps({batch: {side: speeds[-1] for side, speeds in sides.items()}}), flush=True)
    lines = ["| batch | | images/s | ratio | of all rounds |", "| --- " * 5 + "|"]
    for batch, sides in found.items():
        ray, torchrun_, one = sides.values()
        for title, others, scale in (
            ("Ray, 2 workers, against torchrun", torchrun_, 1),
            ("2 workers, against twice 1 worker", one, 2),
        ):
            ratios = [ours / (scale * other) for ours, other in zip(ray, others, strict=True)]
            lines.append(
                f"| {batch} | {title} | {statistics.median(ray):.1f} | {statistics.median(ratios):.2f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} |"
            )
    about = (
        f"`make bench-workers`, {datetime.date.today()}, torch {torch.__version__}, {os.cpu_count()} cores: SimCLR, "
        "resnet18, batches over all workers, two views of 96 pixels from shards, gloo, a core and a thread a worker, "
        f"medians of {arguments.rounds} rounds in turns. Ray's own processes share the cores."
    )
    replace_section(PAGE, "## Ray's cost, and a second worker", [about, "", *lines])


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(sys.argv[-1])
    else:
        main()
