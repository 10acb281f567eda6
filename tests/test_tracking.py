"""Against a real MLflow: in SQLite, and behind a server that is started late."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from conftest import free_port
from darkmatter import tracking


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1 / step, "time": 1000.0 + step, "session": 1.0} for step in steps]


@pytest.fixture
def client(tmp_path: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def told(client: mlflow.MlflowClient, run: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run, "train/loss")]


def test_each_row_is_sent_once_with_its_time(client: mlflow.MlflowClient) -> None:
    run = tracking.begin(client, "f1", "simclr")
    assert tracking.send(client, run, rows(1, 2)) == 2
    assert tracking.send(client, run, rows(1, 2, 3)) == 1
    assert tracking.send(client, run, rows(1, 2, 3)) == 0
    assert told(client, run) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [metric.timestamp for metric in client.get_metric_history(run, "train/loss")] == [1001000, 1002000, 1003000]
    assert list(client.get_run(run).data.metrics) == ["train/loss"]


def test_a_run_is_found_again_until_it_is_finished(client: mlflow.MlflowClient) -> None:
    assert tracking.find(client, "f1") is None
    run = tracking.begin(client, "f1", "simclr")
    assert tracking.begin(client, "f1", "simclr") == run
    assert tracking.begin(client, "f2", "simclr") != run
    assert client.get_run(run).info.run_name == "simclr-f1"
    client.set_terminated(run)
    assert tracking.find(client, "f1") is None
    assert tracking.begin(client, "f1", "simclr") != run


def test_more_than_mlflow_takes_at_once(client: mlflow.MlflowClient) -> None:
    run = tracking.begin(client, "f1", "simclr")
    assert tracking.send(client, run, rows(*range(1, 2502))) == 2501
    assert [step for step, _ in told(client, run)] == list(range(1, 2502))


@pytest.fixture
def late_server(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Its address, and the list to put the process into when it is started."""
    started: list[subprocess.Popen] = []
    yield f"http://127.0.0.1:{free_port()}", started
    for process in started:
        process.terminate()
        process.wait(20)


def test_rows_wait_for_a_server_that_is_away(
    late_server: tuple[str, list[subprocess.Popen]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, started = late_server
    monkeypatch.setattr(tracking, "_EVERY", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trained = rows(1, 2)
    with tracking.sending(uri, "f1", "simclr", lambda: list(trained)):
        deadline = time.monotonic() + 60
        while "MLflow is away" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", uri.rpartition(":")[2], "--workers", "1",
            "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path),
        ]  # fmt: skip
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        client, deadline = mlflow.MlflowClient(tracking_uri=uri), time.monotonic() + 90
        trained += rows(3)
        while time.monotonic() < deadline:
            try:
                if (run := tracking.find(client, "f1")) and len(told(client, run)) == 3:
                    break
            except mlflow.exceptions.MlflowException:
                time.sleep(0.5)
        trained += rows(4)
    assert run is not None
    assert [step for step, _ in told(client, run)] == [1, 2, 3, 4]


def test_what_cannot_be_sent_at_the_end_is_told_and_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracking.sending("http://127.0.0.1:9", "f1", "simclr", lambda: rows(1)):
        pass
    assert "MLflow is away, rows of the history wait" in capsys.readouterr().err
