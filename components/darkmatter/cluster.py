"""Ray: here, on an existing cluster, or inside a submitted job. The only file that imports it.

Nothing has to be started by hand: without RAY_ADDRESS a cluster of this machine is started for the stage and ended with
it; with RAY_ADDRESS (which a submitted job has by itself) the stage runs on that cluster.
"""

import collections
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from darkmatter.params import Config

Answer = TypeVar("Answer")


class PlaceConfig(Config):
    """The section `place` of params.yaml: where things run. No stage depends on it and it decides no result."""

    workers: int = Field(gt=0)
    """Processes of distributed training; each holds a copy of the model."""
    cpus_per_worker: int = Field(gt=0)
    """CPU cores of each: torch's threads, and the threads that decode."""
    gpu: bool
    """Give each worker a GPU."""
    storage: str
    """Folder of checkpoints, shared by all nodes. Outside DVC: an interrupted run finds its own by fingerprint."""
    data: str
    """Address (s3://bucket/folder) that training data is sent to and streamed from, for workers that do not share this
    folder; empty: they read data/train."""
    cache: str
    """Folder on each machine for the shards that come from there."""
    cache_gibibytes: float = Field(gt=0)
    """Its largest size."""
    mlflow: str
    """Tracking URI of the registry; the environment variable MLFLOW_TRACKING_URI wins over it."""
    max_restarts: int = Field(ge=0)
    """How often training restarts from its last checkpoint after a worker died."""


@contextmanager
def session() -> Iterator[None]:
    """Attaches to RAY_ADDRESS, or starts a cluster of this machine and ends it with the block."""
    if not os.environ.get("RAY_ADDRESS"):
        # Ray listens on ports that any user of the machine reaches. A token of this session keeps them shut, and in the
        # environment it is not written to ~/.ray/auth_token, which Ray would do by itself, readable by all. Ray reads
        # the mode when it is first imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        # The dashboard process answers Train's cleaner; without it that warns every second (measured with 2.60).
        ray.init(address="local", include_dashboard=True, logging_level=logging.WARNING, log_to_driver=True)
    try:
        yield
    finally:
        ray.shutdown()


def map_tasks(
    function: Callable[..., Answer], tasks: Iterable[tuple[Any, ...]], what: str, *, total: int | None = None
) -> Iterator[Answer]:
    """`function(*task)` for each task on all cores of the cluster, in order, with a progress bar over `total`.

    Tasks are taken and answers given one after the other: at any time only a few of either exist. A task whose process
    dies is run again by Ray; an exception of a task is raised here.
    """
    import ray
    from tqdm import tqdm

    remote = ray.remote(function)
    ahead = 2 * max(1, round(ray.cluster_resources().get("CPU", 1)))
    pending: collections.deque[Any] = collections.deque()
    with tqdm(desc=what, unit="task", mininterval=1.0, total=total) as progress:
        for task in itertools.chain(tasks, itertools.repeat(None)):
            if task is not None:
                pending.append(remote.remote(*task))
                if len(pending) < ahead:
                    continue
            if not pending:
                return
            try:
                answer = ray.get(pending.popleft())
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            yield answer
            progress.update()


def train(function: Callable[..., None], job: dict[str, Any], place: PlaceConfig, *, name: str) -> None:
    """Runs `function(job, device)` in `place.workers` processes of one process group (NCCL with GPUs, else gloo).

    When a worker dies the group is built again, `place.max_restarts` times, and `function` runs from its start: it must
    find its last checkpoint by itself.

    Raises:
        ValueError: this machine has too few CPUs or GPUs; Ray would wait for them for ever.
        RuntimeError: training ended for good; the message is the worker's.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _check_resources(place)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"function": function, "job": job},
        torch_config=TorchConfig(backend="nccl" if place.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=place.workers,
            use_gpu=place.gpu,
            resources_per_worker={"CPU": place.cpus_per_worker, **({"GPU": 1} if place.gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(Path(place.storage).resolve() / "ray"),
            failure_config=FailureConfig(max_failures=place.max_restarts),
        ),
    )
    trainer.fit()


def _check_resources(place: PlaceConfig) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return  # a cluster may grow
    there = ray.cluster_resources()
    for kind, needed in (("GPU", place.workers * place.gpu), ("CPU", place.workers * place.cpus_per_worker)):
        if needed > there.get(kind, 0):
            raise ValueError(
                f"place asks for {needed} {kind}s ({place.workers} workers), this machine has {there.get(kind, 0):.0f}; "
                "lower place.workers, place.cpus_per_worker or place.gpu"
            )


def _work(call: dict[str, Any]) -> None:
    from ray.train.torch import get_device

    call["function"](call["job"], get_device())
