"""The record of a run in MLflow: rows of numbers while it trains, in a run that is found again by its fingerprint.

MLflow may be away at any time: the history beside the checkpoints holds all rows, and what was not sent is sent later.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from darkmatter.beside import beside

EXPERIMENT = "darkmatter"

_EVERY = 5.0  # seconds between two sendings
_AT_ONCE = 1000  # metrics; MLflow takes no more in one call
_SENT = "sent_to_step"  # a tag
_NOT_METRICS = ("step", "time", "session")


def uri_of(uri: str) -> str:
    """MLFLOW_TRACKING_URI, or else `uri`; the path of an SQLite file made absolute, since workers have other folders."""
    chosen = os.environ.get("MLFLOW_TRACKING_URI") or uri
    start = "sqlite:///"
    return start + os.path.abspath(chosen.removeprefix(start)) if chosen.startswith(start) else chosen


def find(client: Any, fingerprint: str) -> str | None:
    """The MLflow run, if there is one that is not finished yet."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    wanted = f"tags.fingerprint = '{fingerprint}' and attributes.status = 'RUNNING'"
    found = client.search_runs([experiment.experiment_id], wanted, max_results=1)
    return str(found[0].info.run_id) if found else None


def begin(client: Any, fingerprint: str, name: str) -> str:
    """The MLflow run that is not finished yet, or a new one."""
    if run := find(client, fingerprint):
        return run
    experiment = client.get_experiment_by_name(EXPERIMENT)
    number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    run = client.create_run(number, run_name=f"{name}-{fingerprint}", tags={"fingerprint": fingerprint})
    return str(run.info.run_id)


def send(client: Any, run: str, rows: Sequence[Mapping[str, float]]) -> int:
    """Those rows that are later than what is there, as metrics `train/<name>`. Returns how many rows went."""
    from mlflow.entities import Metric

    last = float(client.get_run(run).data.tags.get(_SENT, -1))
    new = [row for row in rows if row["step"] > last]
    now = int(time.time() * 1000)
    metrics = [
        Metric(f"train/{name}", value, int(1000 * row["time"]) if "time" in row else now, int(row["step"]))
        for row in new
        for name, value in row.items()
        if name not in _NOT_METRICS
    ]
    for start in range(0, len(metrics), _AT_ONCE):
        client.log_batch(run, metrics=metrics[start : start + _AT_ONCE])
    if new:
        client.set_tag(run, _SENT, new[-1]["step"])
    return len(new)


@contextmanager
def sending(uri: str, fingerprint: str, name: str, read: Callable[[], Sequence[Mapping[str, float]]]) -> Iterator[None]:
    """Sends rows beside the block, as they come, and what is left at its end. Only tells when MLflow is away.

    Args:
        uri: of MLflow.
        fingerprint: of the run.
        name: of the method.
        read: all rows so far, each step once.
    """
    with beside(functools.partial(_send_until, uri, fingerprint, name, read), "mlflow"):
        yield


def _send_until(
    uri: str,
    fingerprint: str,
    name: str,
    read: Callable[[], Sequence[Mapping[str, float]]],
    done: threading.Event,
) -> None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # we come again by ourselves; seven take minutes
    import mlflow
    from mlflow.exceptions import MlflowException

    client, run, told, last = None, None, False, False
    while not last:
        last = done.wait(_EVERY)
        try:
            rows = read()
            client = client or mlflow.MlflowClient(tracking_uri=uri_of(uri))
            if rows:
                run = run or begin(client, fingerprint, name)
                send(client, run, rows)
            told = False
        except (MlflowException, OSError) as error:
            if last or not told:
                reason = str(error).splitlines()[0][:200]
                print(f"darkmatter: MLflow is away, rows of the history wait ({reason})", file=sys.stderr, flush=True)
            told = True
