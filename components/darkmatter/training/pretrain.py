"""The stage: a training set -> a model folder, through N workers that may die."""

import contextlib
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darkmatter import (
    cluster,
    collectives,
    files,
    lease,
    lineage,
    model,
    plugin,
    remote,
    shards,
    tracking,
    training_set,
)
from darkmatter.augmentations import Prepared, Views
from darkmatter.beside import beside
from darkmatter.console import Preempted, Stopped
from darkmatter.store import Store
from darkmatter.stream import Stream, steps_per_epoch
from darkmatter.training import PretrainConfig, goodput, history, loop, memory, telemetry
from darkmatter.training.run import Run
from darkmatter.training.watchdog import watched

_OF_A_ROW = ("step", "epoch", "images_per_second", "time", "session", "workers")  # not of the whole run
_HELD_OUT = 512  # samples behind each energy margin: its standard error is about 0.01 at 0.95


def pretrain(
    train_folder: Path,
    spec: model.ModelSpec,
    config: PretrainConfig,
    place: cluster.PlaceConfig,
    *,
    out: Path,
    plot: Path,
    start: Path | None = None,
) -> dict[str, Any]:
    """Trains, or goes on training, and writes the model folder `out`.

    The run is named by a fingerprint of code, params and data; under that name its checkpoints lie in `place.storage`,
    and an interrupted run goes on from them.

    Args:
        train_folder: what `augment` wrote.
        spec: of the model.
        config: the section `pretrain`.
        place: where to train.
        out: of the export.
        plot: CSV to write, a row for every look at the run.
        start: model folder to start from; from fresh weights without it.

    Raises:
        ValueError: damaged data, a batch that the workers cannot share or the data cannot fill, or a model to start from
            that is of another kind.
        Unreadable: the data cannot be sent to or read from `place.data`, or `place.storage` cannot be reached.
        Held: another driver trains this run.
        Stopped: the run stopped itself (collapse, numbers that are not finite), now or before, or restarts were of no help.
        Preempted: SIGTERM came; the run is saved.

    Returns:
        Summary: steps, images, images_per_second, final terms, energy_margin, rankme, fingerprint, and where the time went.
    """
    manifest = shards.Manifest.load(train_folder)
    manifest.verify(train_folder)
    least, most = place.worker_range
    for workers in range(least, most + 1):
        equal = workers * config.accumulate
        steps = config.epochs * steps_per_epoch(manifest.samples("train"), config.batch_size, equal)
    objective = model.build(spec, seed=config.seed)  # a wrong option fails here, before any process is started
    anew = model.take_over(objective, spec, start) if start else []
    started_from = model.digest(start) if start else ""
    fingerprint = run_fingerprint(manifest, spec, config, started_from)
    run = Run.of(fingerprint, place)
    views = training_set.choose_views(spec.views, spec.images)
    print(_announce(objective, manifest, config, place, fingerprint, steps), flush=True)
    if started_from:
        print(f"starting from model {started_from[:12]}{f', but anew: {anew}' if anew else ''}", flush=True)
    with lease.held(run.address), run.stopping_at_sigterm():
        if not run.stopped():
            if started_from and not run.checkpoints.newest_step():
                run.checkpoints.save(0, loop.TrainState.fresh(objective, config).state_dict())
            prediction = memory.Prediction(
                objective,
                views.plan(objective.num_views),
                optimizer=config.optimizer,
                gpu=place.gpu,
                activation_checkpointing=place.activation_checkpointing,
                holders=least if place.fsdp else 1,
            )
            shares = memory.Shares(config.batch_size, least, config.accumulate)
            print(_announce_memory(prediction, shares, place), flush=True)
            data = _publish(train_folder, manifest, config, place)
            job = {
                "data": dataclasses.asdict(data),
                "spec": spec.model_dump(),
                "config": config.model_dump(),
                "memory": prediction,
                "run": {"address": run.address, "place": place, "session": run.session},
            }
            rows_so_far = functools.partial(history.read, run.address)
            with (
                _progress(run.address, steps),
                tracking.sending(place.mlflow, fingerprint, spec.objective["name"], rows_so_far),
            ):
                _train_through_failures(run, job)
        rows = history.read(run.address)
        _write_history(rows, plot)  # what led to an early end can be looked at
        if reason := run.stopped():
            raise Stopped(reason)
        saved = run.checkpoints.load_newest()
        if saved is None or saved["step"] != steps:
            raise RuntimeError(f"training ended without its last checkpoint in {run.address}")
        objective.load_state_dict(saved["objective"])
        made_from = {"started_from": started_from, "computed": _computed(rows, place)}
        model.save(out, objective, spec, _provenance(fingerprint, manifest, config, steps) | made_from)
        lost = goodput.shares(history.read_all(run.address), ended=time.time())
    times = {"goodput": lost.pop("step"), "wall_seconds": lost.pop("wall_seconds"), "lost_to": lost}
    return _summary(rows, steps, config, fingerprint) | times


def _train_through_failures(run: Run, job: dict[str, Any]) -> None:
    """
    Raises:
        Stopped: restarts were of no help, or would be of none (DoesNotFit: memory ended).
        Preempted: asked to stop by SIGTERM; what was trained is saved.
    """
    restarts, step = 0, run.checkpoints.newest_step()
    if step:
        print(f"going on from step {step}, the last checkpoint in {run.address}", flush=True)
    while True:
        failure = None
        try:
            cluster.train(work, job, run.place, name=run.address.rpartition("/")[2])
        except cluster.WorkersFailed as error:
            failure = error
        before, step = step, run.checkpoints.newest_step()
        if run.asked:
            raise Preempted(f"asked to stop: saved at step {step} in {run.address}; to run it again goes on there")
        if failure is None:
            return
        for reason in failure.reasons:
            if isinstance(reason, Stopped):  # an answer, not a fault: nothing to restart
                raise reason
        restarts = 1 if step > before else restarts + 1
        if restarts > run.place.max_restarts:
            raise Stopped(
                f"training failed {restarts} times in a row from step {step} on, at last with: {failure}. Where workers "
                f"stood still is in {run.address}/stacks; to run it again goes on from that step"
            ) from failure
        print(
            f"restart {restarts} of {run.place.max_restarts} from step {step}: {failure}", file=sys.stderr, flush=True
        )


def work(job: dict[str, Any], device: torch.device) -> None:
    """What each worker runs: builds everything from plain values and trains."""
    config = PretrainConfig(**job["config"])
    spec = model.ModelSpec(**job["spec"])
    run = Run(**job["run"])
    rank = collectives.rank()
    stacks = f"{run.address}/stacks/{time.strftime('%Y%m%d-%H%M%S')}-rank-{rank}.txt"
    with watched(run.place.stall_seconds, stacks=stacks) as dog:
        views = training_set.choose_views(spec.views, spec.images)
        objective = model.build(spec, seed=config.seed)
        data = _Data(**job["data"])
        manifest = data.manifest()
        with data.reader(manifest, training_set.held_out_split(manifest), config) as reader:
            held_out = training_set.shuffled(reader, _HELD_OUT)
        with data.reader(manifest, "train", config) as reader:
            stream = Stream(
                reader,
                functools.partial(_load, views, config.seed, objective.num_views, device.type == "cuda"),
                batch_size=config.batch_size,
                seed=config.seed,
                window=config.shuffle_shards,
                rank=rank,
                world_size=collectives.world_size(),
                parts=config.accumulate,
                threads=run.place.cpus_per_worker,
            )
            shares = memory.Shares(config.batch_size, collectives.world_size(), config.accumulate)
            try:
                with memory.explained(job["memory"], shares, device), _shown(run, spec, config, stream) as show:
                    loop.fit(
                        objective,
                        stream,
                        views,
                        held_out,
                        config,
                        checkpoints=run.checkpoints,
                        device=device,
                        alive=dog.alive,
                        asked_to_stop=run.asked_to_stop if rank == 0 else lambda: False,
                        show=show,
                        session=run.session,
                        compile=run.place.compile,
                        activation_checkpointing=run.place.activation_checkpointing,
                        fsdp=run.place.fsdp,
                    )
            except memory.DoesNotFit:  # on another machine it may: the driver ends, the run does not
                raise
            except Stopped as reason:  # every rank came to the same answer
                if rank == 0:
                    run.stop(reason)


@contextlib.contextmanager
def _shown(
    run: Run, spec: model.ModelSpec, config: PretrainConfig, stream: Stream[Prepared]
) -> Iterator[Callable[[history.Row], None]]:
    """What rank 0 writes into the history is shown to Prometheus as well."""
    if collectives.rank() != 0:
        yield lambda row: None
        return
    labels = {"run": run.address.rpartition("-")[2], "objective": spec.objective["name"]}
    with telemetry.shown(run.address, config, steps=config.epochs * stream.steps_per_epoch, labels=labels) as show:
        yield show


def _load(
    views: Views, seed: int, whole: int, pinned: bool, contents: Sequence[bytes], samples: Any, *, epoch: int
) -> Prepared:
    prepared = views.prepare(contents, samples, seed=seed, epoch=epoch, whole=whole)
    return prepared.pinned() if pinned else prepared


def _publish(
    train_folder: Path, manifest: shards.Manifest, config: PretrainConfig, place: cluster.PlaceConfig
) -> "_Data":
    """Sends the training set to `place.data`, if there is such an address."""
    data = _Data(
        folder=str(train_folder.resolve()),
        digest=manifest.digest,
        address=place.data,
        cache=str(Path(place.cache).resolve()),
        budget=int(place.cache_gibibytes * 2**30),
    )
    if place.data:
        data.store.check_budget(manifest, "train", window=config.shuffle_shards)
        data.store.publish(train_folder, manifest)
    return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
    """Where a worker reads the training set: in a folder that it shares with the driver, or streamed from an address."""

    folder: str
    digest: str
    address: str
    cache: str
    budget: int

    @functools.cached_property
    def store(self) -> Store:
        """One for all readers of a process: it knows which files of the cache have been compared with their hash."""
        return Store(self.address, cache=Path(self.cache), budget=self.budget)

    def manifest(self) -> shards.Manifest:
        return self.store.manifest(self.digest) if self.address else shards.Manifest.load(Path(self.folder))

    def reader(self, manifest: shards.Manifest, split: shards.Split, config: PretrainConfig) -> shards.Reader:
        if self.address:
            return self.store.reader(manifest, split, window=config.shuffle_shards)
        return shards.Reader(Path(self.folder), manifest, split)


def run_fingerprint(
    manifest: shards.Manifest, spec: model.ModelSpec, config: PretrainConfig, started_from: str = ""
) -> str:
    """Names a run: equal for equal code, params, data and model to start from (its digest)."""
    package = Path(model.__file__).parent
    plugins = [("augmentations", spec.views), ("backbones", spec.backbone), ("objectives", spec.objective)]
    code = [Path(__file__), *(package / folder / f"{section['name']}.py" for folder, section in plugins)]
    options = [plugin.choose(folder, section, where=folder)[1].model_dump() for folder, section in plugins]
    chosen = config.model_dump(exclude={"warm_start"})  # what it names may change; its digest says what it was
    return lineage.fingerprint(
        lineage.code_digest(code), manifest.digest, spec.images.model_dump(), options, chosen, started_from
    )


def _announce(objective: Any, manifest: shards.Manifest, config: Any, place: Any, fingerprint: str, steps: int) -> str:
    workers = " to ".join(dict.fromkeys(map(str, place.worker_range)))
    millions = sum(parameter.numel() for parameter in objective.parameters()) / 1e6
    return (
        f"pretrain {fingerprint}: {type(objective).__name__}, {millions:.1f} M parameters, "
        f"{manifest.samples('train')} images, {config.epochs} epochs of batch {config.batch_size} = {steps} steps, "
        f"{workers} worker(s) x {place.cpus_per_worker} CPU{' + 1 GPU' if place.gpu else ''}"
    )


def _announce_memory(prediction: memory.Prediction, shares: memory.Shares, place: cluster.PlaceConfig) -> str:
    """A warning is part of it if the workers are of this machine and it has too little."""
    need, here = prediction.need(shares.at_a_time), memory.room(torch.device("cpu"))
    text = f"memory of each worker: about {need}, {shares.at_a_time} samples at a time"
    if not place.gpu and not cluster.attached() and shares.workers * need.total > here:
        text += f"\nwarning: it will hardly fit: {prediction.advice(here // shares.workers, shares)}"
    return text


@contextlib.contextmanager
def _progress(address: str, steps: int) -> Iterator[None]:
    """Prints a line every few seconds while the block runs, from the history that rank 0 writes."""
    with beside(functools.partial(_print_progress, address, steps), "progress"):
        yield


def _print_progress(address: str, steps: int, done: threading.Event) -> None:
    started = time.monotonic()
    first_step: float | None = None
    last_step: float = -1
    while not done.wait(5.0):
        try:
            rows = history.read(address)
        except remote.Unreadable:  # the store is away for a while; whoever needs it says so
            continue
        if not rows or rows[-1]["step"] == last_step:
            continue
        if first_step is None:  # of this run: what was trained before a kill says nothing about the speed now
            started, first_step = time.monotonic(), rows[-1]["step"]
        last_step = rows[-1]["step"]
        margin, loss = (_last(rows, name) for name in ("energy_margin", "loss"))
        pace = (time.monotonic() - started) / max(1, last_step - first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (steps - last_step))) if last_step > first_step else "?"
        print(
            f"step {last_step:>6.0f}/{steps}  loss {loss}  energy margin {margin}  "
            f"{rows[-1]['images_per_second']:>8,.0f} images/s  {left} left",
            flush=True,
        )


def _last(rows: list[dict[str, float]], name: str) -> str:
    return next((f"{row[name]:.4f}" for row in reversed(rows) if name in row), "   -  ")


def _write_history(rows: list[dict[str, float]], path: Path) -> None:
    """CSV for `dvc plots`: a column for every number that any row has, but for the times of day."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("time", "session")]
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    files.write(path, "\n".join(lines) + "\n")


def _summary(rows: list[dict[str, float]], steps: int, config: PretrainConfig, fingerprint: str) -> dict[str, Any]:
    speeds = [row["images_per_second"] for row in rows]
    return {
        "fingerprint": fingerprint,
        "steps": steps,
        "images": steps * config.batch_size,
        "images_per_second": float(np.median(speeds)),
        **{name: value for name, value in rows[-1].items() if name not in _OF_A_ROW and "seconds" not in name},
    }


def _provenance(fingerprint: str, manifest: shards.Manifest, config: PretrainConfig, steps: int) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "training_data": manifest.digest,
        "training_samples": manifest.samples("train"),
        "seed": config.seed,
        "steps": steps,
        "versions": lineage.versions(),
    }


def _computed(rows: list[dict[str, float]], place: cluster.PlaceConfig) -> dict[str, Any]:
    """What decides the last bits of the weights: sums of other lengths, or by other instructions, round differently."""
    return {
        "workers": sorted({int(row["workers"]) for row in rows}),
        "cpus_per_worker": place.cpus_per_worker,
        "gpu": place.gpu,
        "compile": place.compile,
        "fsdp": place.fsdp,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
