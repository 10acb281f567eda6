import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from darkmatter import lease
from darkmatter.lease import LOST, Held, held

HOLDS = """
import sys, time
from darkmatter import lease
lease._RENEW = 0.1
with lease.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW", 0.1)
    monkeypatch.setattr(lease, "_SETTLE", 0.05)
    monkeypatch.setattr(lease, "_EXPIRE", 1.0)


@pytest.fixture
def holder(tmp_path: Path):  # type: ignore[no-untyped-def]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_driver_is_refused_with_the_name_of_the_first(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(Held, match=rf"process {holder.pid} on .* trains this run"), held(str(tmp_path)):
        pytest.fail("held twice")
    assert json.loads((tmp_path / "lease.json").read_text())["pid"] == holder.pid


def test_what_a_process_that_was_killed_here_held_is_free_at_once(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_EXPIRE", 1000.0)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with held(str(tmp_path)):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lease.json").exists()


def test_another_machine_s_is_free_after_a_while_without_a_sign(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    gone = {"token": "x", "host": "elsewhere", "pid": 1, "started": 0.0, "renewed": 0.0}
    (tmp_path / "lease.json").write_text(json.dumps(gone))
    with held(str(tmp_path)):
        assert json.loads((tmp_path / "lease.json").read_text())["token"] != "x"
    assert "waiting for a sign of life of process 1 on elsewhere" in capsys.readouterr().out


def test_a_driver_whose_lease_another_one_took_ends(tmp_path: Path, holder: subprocess.Popen) -> None:
    other = {"token": "y", "host": "elsewhere", "pid": 2, "started": 0.0, "renewed": 0.0}
    (tmp_path / "lease.json").write_text(json.dumps(other))
    _, told = holder.communicate(timeout=20)
    assert holder.returncode == LOST
    assert b"process 2 on elsewhere trains this run" in told
    assert json.loads((tmp_path / "lease.json").read_text()) == other


def test_of_two_that_begin_together_one_goes_on(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(2)
    ]
    deadline = time.monotonic() + 60
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    gone = [process for process in processes if process.poll() is not None]
    for process in processes:
        process.kill()
    told = [process.communicate()[1].decode() for process in processes]
    assert len(gone) == 1, told
    assert "trains this run" in told[processes.index(gone[0])]
