"""Faults on purpose, at a step and a rank, once each: what `pretrain.work` runs in a test, and a driver to kill."""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

WORKER = ("SIGKILL", "SIGTERM", "exit", "SIGSEGV", "exception", "SIGSTOP", "sleep")


def strike(kind: str) -> None:
    """It happens to this process."""
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(1000)  # a handler may have taken the signal
    elif kind == "exit":
        os._exit(3)
    elif kind == "crash":
        ctypes.string_at(0)
    elif kind == "controller":
        for process in psutil.Process(os.getppid()).children():
            if "TrainController" in " ".join(process.cmdline()):
                process.kill()
        time.sleep(1000)
    elif kind == "memory":
        torch.empty(2**50)
    elif kind == "sleep":
        time.sleep(1000)
    else:
        raise RuntimeError("a fault on purpose")


def work(schedule: list[list[Any]], folder: str, job: dict[str, Any], device: torch.device) -> None:
    """`pretrain.work` where things go wrong.

    Args:
        schedule: (step, rank, place, kind) of each fault; its place is `step`, `load` or `save`.
        folder: of the marks that say which have happened.
        job: of `pretrain.work`.
        device: of it.
    """
    from darkmatter import collectives, stream
    from darkmatter.training import checkpoint, guards, pretrain

    def happens(place: str, step: int) -> None:
        for number, (when, rank, where, kind) in enumerate(schedule):
            mark = Path(folder) / str(number)
            if (when, rank, where) == (step, collectives.rank(), place) and not mark.exists():
                mark.write_text(f"{time.time()}")
                strike(kind)

    may_step, load, save = guards.Numbers.may_step, stream.Stream._batch, checkpoint.files.write_json
    guards.Numbers.may_step = lambda self, loss, norm, step: (happens("step", step), may_step(self, loss, norm, step))[
        1
    ]
    stream.Stream._batch = lambda self, step, samples: (happens("load", step), load(self, step, samples))[1]

    def half_way(path: Path, value: Any) -> None:  # the state is written, what makes it a checkpoint is not
        happens("save", value["step"])
        save(path, value)

    checkpoint.files.write_json = half_way
    pretrain.work(job, device)


def train(
    train_folder: Path, folder: Path, wrapper: Callable[..., None] | None = None, **changes: Any
) -> dict[str, Any]:
    """The stage on two workers; returns its summary."""
    import runs

    from darkmatter.training import pretrain

    of_config = {name: changes.pop(name) for name in ("epochs", "learning_rate") if name in changes}
    config = runs.CONFIG.model_copy(update={"epochs": 12, "save_every": 5, "health_every": 60, **of_config})
    place = runs.place(folder, **{"stall_seconds": 8.0, **changes})
    plain = pretrain.work
    if wrapper:
        pretrain.work = wrapper
    try:
        spec = runs.spec(train_folder, "simclr")
        return pretrain.pretrain(train_folder, spec, config, place, out=folder / "model", plot=folder / "history.csv")
    finally:
        pretrain.work = plain


if __name__ == "__main__":
    from darkmatter import cluster, console

    def main() -> None:
        cluster._GROW_EVERY = 2.0
        with cluster.session():
            print(json.dumps(train(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))))

    console.run(main)
