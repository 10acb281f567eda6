"""What a step of training costs, beside lightly's, and what training spends on other things than arithmetic.

    make bench-training        # an hour on two cores; writes into docs/performance.md

Each side is a process of its own that trains so many steps when it is told to; sides take turns, so that a noisy machine is
noisy to both. Ours is the loop as it is, with its guards, clock and history. Lightly's is what its examples do: its data set
of image files, its transform, torch's DataLoader, its heads and loss, on the same backbone.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import in_process
from darkmatter import cluster, model, shards, sources, training_set
from darkmatter.augmentations import Prepared
from darkmatter.beside import beside
from darkmatter.stream import Batch, Stream
from darkmatter.training import loop, optimizers
from darkmatter.training.checkpoint import Checkpoints, Saver
from data import PAGE, make_training_set, replace_section
from objectives import LIGHTLY, OPTIONS

BATCH, SIZE, LOCAL = 32, 96, 48  # patches of 16 pixels fit into both
SKIPPED, COUNTED = 6, 6  # steps of a turn; while a side waits for its turn it loads ahead, for five steps at most
METHODS = ("simclr", "vicreg", "byol", "dino", "swav", "mae")
#: Our policy with the numbers of lightly's transform of the same name.
VIEWS: dict[str, dict[str, Any]] = {
    "simclr": {"min_area": 0.08, "jitter": [0.8, 0.8, 0.8, 0.2], "blur_probability": [0.5] * 3},
    "vicreg": {
        "min_area": 0.08, "jitter": [0.4, 0.4, 0.2, 0.1], "blur_probability": [0.5] * 3,
        "solarize_probability": [0.1, 0.1, 0.0],
    },
    "byol": {
        "min_area": 0.08, "jitter": [0.4, 0.4, 0.2, 0.1], "blur_probability": [1.0, 0.1, 0.0],
        "solarize_probability": [0.0, 0.2, 0.0],
    },
    "dino": {
        "min_area": 0.4, "jitter": [0.4, 0.4, 0.2, 0.1], "blur_probability": [1.0, 0.1, 0.5], "local_views": 6,
        "local_scale": LOCAL / SIZE, "solarize_probability": [0.0, 0.2, 0.0],
    },
    "swav": {
        "min_area": 0.14, "jitter": [0.8, 0.8, 0.8, 0.2], "blur_probability": [0.5] * 3, "local_views": 6,
        "local_scale": LOCAL / SIZE,
    },
    "mae": {"min_area": 0.2, "jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": [0.0] * 3},
}  # fmt: skip


def specification(method: str, backbone: str, folder: Path) -> model.ModelSpec:
    images = training_set.load_image_spec(folder / "train")
    small = {"name": "small_conv", "small_conv": {"width": 32}}
    return model.ModelSpec(
        backbone=small if backbone == "small_conv" else {"name": "timm", "timm": {"model": backbone}},
        objective={"name": method, method: OPTIONS[method]},
        views={"name": "natural", "natural": VIEWS[method]},
        images=images.model_copy(update={"image_size": SIZE}),
        num_samples=shards.Manifest.load(folder / "train").samples("train"),
    )


class Turns:
    """Of a side: waits to be told how many steps to take, and tells how long those took that count."""

    def __init__(self) -> None:
        self._left, self._began = 0, 0.0

    def step(self) -> None:
        """Before each step, and after the last."""
        if self._left == COUNTED:
            self._began = time.perf_counter()
        if not self._left:
            if self._began:
                print(json.dumps(time.perf_counter() - self._began), flush=True)
            if not sys.stdin.readline():
                sys.exit()
            self._left = SKIPPED + COUNTED
        self._left -= 1


@dataclasses.dataclass
class InMemory:
    """Stands for stream and policy: the same views at every step."""

    views: Sequence[Tensor]
    steps_per_epoch: int = 10**6

    def batches(self, start: int, stop: int) -> Iterator[Batch[Prepared]]:
        nothing = torch.zeros(BATCH, 2, dtype=torch.int64)
        loaded = Prepared(pixels=(), sizes=nothing, samples=torch.arange(BATCH))
        return (Batch(step=step, epoch=0, loaded=loaded) for step in range(start, stop))

    def finish(self, prepared: Prepared, **_: Any) -> Sequence[Tensor]:
        return self.views

    def __call__(self, contents: Sequence[bytes], samples: Any, **_: Any) -> Sequence[Tensor]:
        few = [view[:2] for view in self.views]
        return few if len(few) > 1 else few * 2  # a look at the health takes two


def some_views(method: str) -> list[Tensor]:
    torch.manual_seed(0)
    whole = 1 if method == "mae" else 2
    return [torch.rand(BATCH, 3, SIZE, SIZE) for _ in range(whole)] + [
        torch.rand(BATCH, 3, LOCAL, LOCAL) for _ in range(VIEWS[method].get("local_views", 0))
    ]


def train_ours(method: str, backbone: str, source: str, folder: Path, turns: Turns) -> None:
    spec = specification(method, backbone, folder)
    objective = model.build(spec, seed=0)
    config = in_process.pretraining(seed=0, epochs=10**6, batch_size=BATCH, learning_rate=0.0001, log_every=50)
    views = training_set.choose_views(spec.views, spec.images)
    load = functools.partial(views.prepare, seed=0, whole=objective.num_views)
    turns.step()
    with shards.Reader(folder / "train", shards.Manifest.load(folder / "train"), "train") as reader:
        stream: Any = Stream(reader, load, batch_size=BATCH, seed=0, threads=torch.get_num_threads())
        if source == "memory":
            stream = views = InMemory(some_views(method))  # type: ignore[assignment]
        with tempfile.TemporaryDirectory() as run:
            loop.fit(
                objective, stream, views, [reader.read(0), reader.read(1)], config, checkpoints=Checkpoints(run, keep=1),
                device=torch.device("cpu"), alive=turns.step,
            )  # fmt: skip


def transform(method: str) -> Callable[..., Any]:
    from lightly import transforms
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    views = {"global_crop_size": SIZE, "local_crop_size": LOCAL}
    return {
        "simclr": lambda: transforms.SimCLRTransform(input_size=SIZE),
        "vicreg": lambda: transforms.VICRegTransform(input_size=SIZE),
        "byol": lambda: transforms.BYOLTransform(
            BYOLView1Transform(input_size=SIZE), BYOLView2Transform(input_size=SIZE)
        ),
        "dino": lambda: transforms.DINOTransform(**views),
        "swav": lambda: transforms.SwaVTransform(crop_sizes=(SIZE, LOCAL)),
        "mae": lambda: transforms.MAETransform(input_size=SIZE),
    }[method]()


def train_lightlys(method: str, backbone: str, source: str, folder: Path, turns: Turns) -> None:
    from lightly.data import LightlyDataset

    spec = specification(method, backbone, folder)
    twin = LIGHTLY[method](model.build(spec, seed=0).backbone, OPTIONS[method])
    twin.backbone.normalise = nn.Identity()  # its transforms normalise
    # Its examples take SGD for most; AdamW on both sides, so that memory is compared on equal terms.
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.0001, weight_decay=0.05)
    loader: Any = [(some_views(method),)]
    if source == "shards":
        loader = torch.utils.data.DataLoader(
            LightlyDataset(str(folder / "files"), transform=transform(method)), batch_size=BATCH, shuffle=True,
            drop_last=True, num_workers=torch.get_num_threads(),
        )  # fmt: skip
    turns.step()
    while True:
        for batch in loader:
            loss = twin.loss(*batch[0])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            twin.after_step(0.5)
            turns.step()


class Side:
    """The process of a side."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--side", *words]
        environment = {**os.environ, **(cluster.MALLOC if words[0] == "darkmatter" else {})}  # as our workers have it
        self._process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.mebibytes = 0.0

    def first_turn(self) -> None:
        """What is compiled, cached and started at first. It is weighed here: that takes a tenth of a core (measured)."""
        with beside(self._weigh, "memory"):
            self.turn()

    def turn(self) -> float:
        """Images per second."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a side ended with status {self._process.wait()}")
        return COUNTED * BATCH / json.loads(answer)

    def _weigh(self, done: threading.Event) -> None:
        """All its processes, what they share counted once, at the largest."""
        first = psutil.Process(self._process.pid)
        while not done.wait(0.2):
            with contextlib.suppress(psutil.NoSuchProcess):  # a loader process at the end of an epoch
                whole = sum(one.memory_full_info().pss for one in (first, *first.children(recursive=True)))
                self.mebibytes = max(self.mebibytes, whole / 2**20)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def beside_lightly(folder: Path, pairs: Sequence[tuple[str, str]], rounds: int, *, missing: bool) -> None:
    """From memory and from shards, each method on its backbone; a row is on the page as soon as it is measured."""
    for method, backbone in pairs:
        for source in ("memory", "shards"):
            if missing and (method, backbone, source) in rows_there():
                continue
            sides = [Side(side, method, backbone, source, str(folder)) for side in ("darkmatter", "lightly")]
            for side in sides:
                side.first_turn()
            turns = [[side.turn() for side in sides] for _ in range(rounds)]
            for side in sides:
                side.end()
            ratios = [ours / other for ours, other in turns]
            ours, other = (statistics.median(column) for column in zip(*turns, strict=True))
            row = (
                f"| `{method}` | {backbone} | {source} | {ours:.1f} | {other:.1f} | {statistics.median(ratios):.2f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} | {sides[0].mebibytes:,.0f} | {sides[1].mebibytes:,.0f} | "
                f"{datetime.date.today()} |"
            )
            print(row, flush=True)
            put_row(row, (method, backbone, source), rounds)


_STEP_TITLE = "## A step beside lightly's"
_STEP_HEAD = [
    "| method | backbone | images | ours / s | lightly's / s | ratio | of all rounds | MiB | lightly's | measured |",
    "| --- " * 10 + "|",
]


def put_row(row: str, what: tuple[str, str, str], rounds: int) -> None:
    """In place of the one that is there, or at the end."""
    rows = {**rows_there(), what: row}
    about = (
        f"`make bench-training`, torch {torch.__version__}, two cores and threads: batches of {BATCH}, views of {SIZE} "
        f"pixels (small ones of {LOCAL}), float32, AdamW, lightly 1.6.0; medians of {rounds} rounds in turns, "
        f"each of {COUNTED} steps. `memory`: the same views at every step, so the arithmetic alone; `shards`: from JPEGs "
        "of at most 128 pixels, ours in tars, lightly's in files read by two loader processes. Our process has the "
        "environment of our workers, where malloc keeps memory (`cluster.MALLOC`; DECISIONS.md says what that brings). MiB: "
        "of all processes of a side, what they share counted once, in an unmeasured turn before."
    )
    replace_section(PAGE, _STEP_TITLE, [about, "", *_STEP_HEAD, *rows.values()])


def rows_there() -> dict[tuple[str, ...], str]:
    """Of the page, by method, backbone and source."""
    _, _, section = PAGE.read_text().partition(_STEP_TITLE + "\n")
    rows = (line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `"))
    return {tuple(cell.strip(" `") for cell in row.split("|")[1:4]): row for row in rows}


def prepare(images: str, folder: Path) -> None:
    """A training set of images of at most 128 pixels, and the same bytes as files."""
    make_training_set(sources.SourceConfig(uri=images, labels=False), folder, max_side=128)
    (folder / "files").mkdir()
    with shards.Reader(folder / "train", shards.Manifest.load(folder / "train"), "train") as reader:
        for number in range(len(reader)):
            (folder / "files" / f"{number:06d}.jpg").write_bytes(reader.read(number))


def trained(millions: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network of so many parameters and AdamW's two moments of each."""
    network = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(millions)))
    optimizer = optimizers.build(network)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return network, optimizer


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def saving_section(rounds: int) -> list[str]:
    lines = [
        "| parameters | state | saved at once, s | the loop waits, s | share | of all rounds | speed meanwhile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    images = torch.randn(256, 1000)
    work = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))

    def step() -> None:
        work(images).square().mean().backward()
        work.zero_grad(set_to_none=True)

    for millions in (5, 25, 86):
        network, optimizer = trained(millions)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        whole, waited, slowed = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(folder, keep=1)
            with Saver(checkpoints) as saver:
                saver.save(0, state)  # the copy is made once
                saver.save(0, state)
                saver._settle(last=True)
                for number in range(1, rounds + 1):
                    whole.append(seconds(lambda: checkpoints.save(2 * number, state)))  # noqa: B023
                    quiet = statistics.median(seconds(step) for _ in range(30))
                    waited.append(seconds(lambda: saver.save(2 * number + 1, state)))  # noqa: B023
                    steps = []
                    while saver._pending and not saver._pending.done():
                        steps.append(seconds(step))
                    saver._settle(last=True)
                    slowed.append(quiet / statistics.median(steps) if steps else 1.0)
        shares = [one / other for one, other in zip(waited, whole, strict=True)]
        size = sum(one.numel() for one in network.parameters()) * 12 / 2**20
        lines.append(
            f"| {millions} M | {size:,.0f} MiB | {statistics.median(whole):.2f} | {statistics.median(waited):.3f} | "
            f"{statistics.median(shares):.1%} | {min(shares):.1%} to {max(shares):.1%} | {statistics.median(slowed):.0%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder:/data/photos, or another source of colour images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--missing", action="store_true", help="only the rows that are not on the page yet")
    arguments = parser.parse_args()
    today, version = datetime.date.today(), torch.__version__
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with cluster.session():
            prepare(arguments.images, folder)
        methods = arguments.method or METHODS
        large = [(name, "vit_tiny_patch16_224" if name in ("mae", "dino") else "resnet18") for name in methods]
        small = [(name, "small_conv") for name in methods if name != "mae"]  # lightly's needs a transformer
        beside_lightly(folder, [*large, *small], arguments.rounds, missing=arguments.missing)
    torch.set_num_threads(1)
    about = (
        f"`make bench-training`, {today}, torch {version}, one thread, {arguments.rounds} "
        "rounds; weights and AdamW's moments, float32, to a disk with fsync and sha256. The last column is the speed of a "
        "small training step while a save is written, against its speed when none is, on the same two cores."
    )
    replace_section(PAGE, "## What a checkpoint costs the loop", [about, "", *saving_section(arguments.rounds)])


if __name__ == "__main__":
    if "--side" in sys.argv:
        which, *rest, place = sys.argv[2:]
        torch.set_num_threads(2)
        (train_ours if which == "darkmatter" else train_lightlys)(*rest, Path(place), Turns())
    else:
        main()
