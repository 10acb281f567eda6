"""Ray: here, on an existing cluster, or inside a submitted job. The only file that imports it.

Nothing has to be started by hand: without RAY_ADDRESS a cluster of this machine is started for the stage and ended with
it; with RAY_ADDRESS (which a submitted job has by itself) the stage runs on that cluster.
"""

import asyncio
import collections
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psutil
from pydantic import Field, field_validator

from darkmatter import files, remote
from darkmatter.params import Config

Answer = TypeVar("Answer")

_Count = Annotated[int, Field(gt=0)]

_GROW_EVERY = 30.0  # seconds between two looks at whether more workers could be had
_READY_WITHIN = 300.0  # seconds that a cluster may take from its start until it accepts a job
_POLL = 1.0


class PlaceConfig(Config):
    """The section `place` of params.yaml: where things run. No stage depends on it and it decides no result."""

    workers: _Count | Annotated[list[_Count], Field(min_length=2, max_length=2)]
    """Processes of distributed training; each holds a copy of the model. Two numbers are the fewest and the most: training
    goes on with fewer when a node is lost, and with more when one comes. The global batch stays, so that each number between
    must divide it."""
    cpus_per_worker: int = Field(gt=0)
    """CPU cores of each: torch's threads, and the threads that decode."""
    gpu: bool
    """Give each worker a GPU."""
    compile: bool
    """Compile the blocks of the backbone (torch.compile): a minute at the start, then shorter steps; worth it on GPUs."""
    activation_checkpointing: bool
    """Compute the inside of each block of the backbone twice instead of keeping it: less memory, a third more time."""
    fsdp: bool
    """Divide weights, gradients and the optimizer's state among the workers (FSDP2), for models that one GPU cannot hold."""
    storage: str
    """Folder, or address (s3://bucket/folder), of checkpoints, shared by all nodes. Outside DVC: an interrupted run finds
    its own by fingerprint."""
    data: str
    """Address (s3://bucket/folder) that training data is sent to and streamed from, for nodes that do not share this
    folder; all other work stays on the node of the stage then. Empty: every node reads this folder."""
    cache: str
    """Folder on each machine for the shards that come from there."""
    cache_gibibytes: float = Field(gt=0)
    """Its largest size."""
    features: str
    """Folder, or address, where evaluation keeps embeddings, by weights and data: a killed one goes on, and new data
    costs only the new. May be removed at any time."""
    dvc: str
    """Address (s3://bucket/folder, or a folder) of DVC's remote, where a job (docs/jobs.md) finds what earlier ones made;
    empty: the remote of .dvc/config, if there is one."""
    mlflow: str
    """Tracking URI of the registry; the environment variable MLFLOW_TRACKING_URI wins over it."""
    signing_key: str
    """PEM file of an elliptic curve's private key (P-256, P-384 or P-521, no password) that signs what is registered;
    empty: nothing is signed."""
    max_restarts: int = Field(ge=0)
    """How often in a row training restarts from the same checkpoint after a failure. One that gets further sets
    the count back."""
    stall_seconds: float = Field(gt=0)
    """A worker that makes no step for so long is ended, and where it stood is written beside the checkpoints. The first step
    may take ten times as long."""
    keep_checkpoints: int = Field(gt=0)
    """How many of the newest stay, beside the one with the best energy margin."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        least, most = (self.workers, self.workers) if isinstance(self.workers, int) else self.workers
        return least, most

    @field_validator("workers")
    @classmethod
    def _rising(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and value[0] > value[1]:
            raise ValueError(f"the fewest workers, {value[0]}, are more than the most, {value[1]}")
        return value


def attached() -> bool:
    """Whether there is a cluster to attach to, which may be larger than this machine."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def session(place: PlaceConfig | None = None) -> Iterator[None]:
    """Attaches to RAY_ADDRESS, or starts a cluster of this machine and ends it with the block.

    Workers of a cluster get this code, whatever is installed there. Tasks stay on the node of this process if `place` says
    that the others do not share its folder.
    """
    global _tasks_stay  # like Ray's own session: one a process  # noqa: PLW0603
    before, _tasks_stay = _tasks_stay, attached() and place is not None and bool(place.data)
    try:
        with _attached_or_started():
            yield
    finally:
        _tasks_stay = before


_tasks_stay = False


@contextmanager
def _attached_or_started() -> Iterator[None]:
    if not attached():
        # Ray listens on ports that any user of the machine reaches. A token of this session keeps them shut, and in the
        # environment it is not written to ~/.ray/auth_token, which Ray would do by itself, readable by all. Ray reads
        # the mode when it is first imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if not attached() or _is_on_loopback(os.environ["RAY_ADDRESS"]):
        # Else Ray takes the machine's own address for 127.0.0.1 and listens on all of them (measured with 2.60). Read at
        # the first import as well.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if attached():
        ray.init(log_to_driver=True, runtime_env={"py_modules": [str(Path(__file__).parent)]})
    else:
        # The dashboard process answers Train's cleaner; without it that warns every second (measured with 2.60).
        # Its folders are open to all users of the machine, and code lies in them: they are inside one that is not.
        options: dict[str, Any] = {"include_dashboard": True, "log_to_driver": True}
        options["_temp_dir"] = str(files.own_temporary() / "ray")
        ray.init(address="local", logging_level=logging.WARNING, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _is_on_loopback(address: str) -> bool:
    """Whether the cluster is one of this machine that listens on 127.0.0.1 alone, as `launch` starts it."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    lines: list[Any] = [one.laddr for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    listening = {line.ip for line in lines if str(line.port) == port}
    return bool(listening) and all(ip.endswith("127.0.0.1") for ip in listening)


def map_tasks(
    function: Callable[..., Answer],
    tasks: Iterable[tuple[Any, ...]],
    what: str,
    *,
    total: int | None = None,
    gpu: bool = False,
) -> Iterator[Answer]:
    """`function(*task)` for each task on all cores of the cluster, in order, with a progress bar over `total`; on all GPUs,
    with `gpu`. Where the nodes do not share this folder (`session`), only on those of this node.

    Tasks are taken and answers given one after the other: at any time only a few of either exist. A task whose process
    dies is run again by Ray; an exception of a task is raised here.
    """
    import ray
    from tqdm import tqdm

    options: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 1}
    if _tasks_stay:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    remote = ray.remote(**options)(function)
    ahead = 2 * max(1, round(_for_tasks("GPU" if gpu else "CPU")))
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


def has_gpus_for_tasks() -> bool:
    """Whether `map_tasks` may be asked for GPUs; the node of a stage often has none."""
    return _for_tasks("GPU") > 0


def _for_tasks(kind: str) -> float:
    import ray
    from ray.util.state import list_nodes

    if not _tasks_stay:
        return float(ray.cluster_resources().get(kind, 0))
    context = ray.get_runtime_context()
    here = list_nodes(address=context.gcs_address, filters=[("node_id", "=", context.get_node_id())])
    return float(here[0].resources_total.get(kind, 0))


def share(value: Any) -> Any:
    """A value that many tasks take, sent once: what is given to `map_tasks` in its place."""
    import ray

    return ray.put(value)


def gauges(described: Mapping[str, str], labels: Mapping[str, str]) -> Callable[[Mapping[str, float]], None]:
    """For a worker: numbers that Prometheus reads at the metrics port of its node, there called `ray_<name>`.

    Args:
        described: what each number is, by its name.
        labels: of all of them.

    Returns:
        Sets some of them; they stay as long as this process lives.
    """
    from ray.util.metrics import Gauge

    made = {name: Gauge(name, description=text, tag_keys=tuple(labels)) for name, text in described.items()}
    for gauge in made.values():
        gauge.set_default_tags(dict(labels))

    def show(numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            made[name].set(value)

    return show


#: Environment of a process that trains on CPUs: glibc keeps the memory that a step has freed for the next one, which asks
#: for the same. By itself it gives large pieces back to the system, which fills them with zeros again (man page
#: mallopt(3)). Steps of MAE on a ViT-tiny and of SimCLR on small_conv took 0.85 of the time, ResNet-18's 0.95, for up to 5%
#: more memory (measured). One arena for all threads, since the one that trains would get its own, with limits of its own.
MALLOC: Mapping[str, str] = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_ARENA_MAX": "1",
}


class WorkersFailed(RuntimeError):
    """Distributed training ended with a failure of one or more workers; the message says which and why."""

    def __init__(self, message: str, reasons: Sequence[BaseException] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons
        """What workers raised; for one that died, what Ray says of it."""


def train(function: Callable[..., None], job: dict[str, Any], place: PlaceConfig, *, name: str) -> None:
    """Runs `function(job, device)` in the workers of one process group (NCCL with GPUs, else gloo).

    When a node comes or goes and `place.workers` names a range, the group is built again with another number of workers,
    and `function` runs from its start: it must find its last checkpoint by itself.

    Raises:
        ValueError: this machine has too few CPUs or GPUs; Ray would wait for them for ever.
        WorkersFailed: a worker died or raised; all are gone.
    """
    # A worker that does not answer, since it is stopped or its machine hangs, is given up after as long as one that answers
    # but makes no step. Ray's own default is 600.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(place.stall_seconds))
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    _check_resources(place)
    least, most = place.worker_range
    name = f"{name}-{time.time_ns()}"  # restarts are ours: Ray must not find what it knew of an earlier one
    with _scratch(place.storage, name) as (storage, filesystem):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"function": function, "job": job},
            torch_config=TorchConfig(backend="nccl" if place.gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=most if least == most else (least, most),
                elastic_resize_monitor_interval_s=_GROW_EVERY,
                use_gpu=place.gpu,
                resources_per_worker={"CPU": place.cpus_per_worker, **({"GPU": 1} if place.gpu else {})},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                storage_filesystem=filesystem,
                worker_runtime_env={} if place.gpu else {"env_vars": dict(MALLOC)},
                # Of groups that do not start: a cluster that may grow is waited for, this machine will not grow.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=-1 if attached() else 2),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            failures = sorted(error.worker_failures.items())
            text = "; ".join(f"worker {rank}: {_last_line(one)}" for rank, one in failures)
            raise WorkersFailed(text, list(error.worker_failures.values())) from error
        except ControllerError as error:
            raise WorkersFailed(_last_line(error)) from error
        except ray.exceptions.RayActorError as error:  # what watches the workers is gone
            _release_placement_groups()
            raise WorkersFailed(_last_line(error)) from error


def _release_placement_groups() -> None:
    """Of this job: what a controller that died had reserved. The next one would wait for it for ever.

    Ray's own cleaner gives up when two clusters run on one machine: it looks for the address and finds two (2.60).
    """
    import ray
    from ray.util import state
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    context = ray.get_runtime_context()
    mine = [("creator_job_id", "=", context.get_job_id()), ("state", "!=", "REMOVED")]
    for group in state.list_placement_groups(address=context.gcs_address, filters=mine, limit=10_000):
        identity = ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))
        remove_placement_group(PlacementGroup(identity))


def _last_line(error: BaseException) -> str:
    """Of a message that has a traceback in it: the line that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _scratch(storage: str, name: str) -> Iterator[tuple[str, Any]]:
    """A folder that Ray wants all nodes to share, and the file system it is on. What it calls `name` there does not outlive
    the block; other runs may use the folder too."""
    address = f"{storage if remote.is_remote(storage) else Path(storage).resolve()}/ray"
    try:
        if remote.is_remote(address):
            import pyarrow.fs

            filesystem, path = remote.file_system(address)
            yield path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
        else:
            yield address, None
    finally:
        remote.remove_folder(remote.join(address, name))


def _check_resources(place: PlaceConfig) -> None:
    import ray

    if attached():
        return  # a cluster may grow
    there = ray.cluster_resources()
    least, _ = place.worker_range
    for kind, needed in (("GPU", least * place.gpu), ("CPU", least * place.cpus_per_worker)):
        if needed > there.get(kind, 0):
            raise ValueError(
                f"place asks for {needed} {kind}s ({least} workers), this machine has {there.get(kind, 0):.0f}; "
                "lower place.workers, place.cpus_per_worker or place.gpu"
            )


def submit(command: Sequence[str], *, address: str, name: str) -> str:
    """Sends a command to a cluster, as a job on its head node. Returns the job's id.

    Waits for a cluster that is just starting. `address` is that of its dashboard, `http://HOST:8265`.

    Raises:
        ValueError: nobody answers there, or the token is not the cluster's.
    """
    import shlex

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    deadline, told = time.monotonic() + _READY_WITHIN, False
    while True:
        try:
            client = JobSubmissionClient(address)
            return client.submit_job(entrypoint=shlex.join(command), metadata={"name": name})
        except AuthenticationError as error:
            raise ValueError(f"{address} does not accept this token: {_last_line(error)}") from error
        except ConnectionError as error:
            problem: Exception = error
        except RuntimeError as error:  # the head answers before it can start anything
            if "No available agent" not in str(error):
                raise ValueError(f"{address} does not take the job: {_last_line(error)}") from error
            problem = error
        if time.monotonic() > deadline:
            raise ValueError(f"{address} takes no job: {_last_line(problem)}") from problem
        if not told:
            print(f"waiting for {address} ({_last_line(problem)})", flush=True)
        told = True
        time.sleep(_POLL)


def follow(job: str, *, address: str) -> int:
    """Prints what a job prints, until it ends. Returns its exit status; 1 for one that had none."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address)

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    while True:
        asyncio.run(tail())
        info = client.get_job_info(job)
        if JobStatus(info.status).is_terminal():
            break
        time.sleep(_POLL)  # the line was cut
    if info.driver_exit_code is None:
        print(f"job {job}: {info.message}", flush=True)
    return 1 if info.driver_exit_code is None else int(info.driver_exit_code)


def _work(call: dict[str, Any]) -> None:
    from ray.train.torch import get_device

    call["function"](call["job"], get_device())
