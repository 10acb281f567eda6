import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from darkmatter.training import watchdog
from darkmatter.training.watchdog import STALLED, watched

HANGS = """
import sys, threading, time
from darkmatter.training import watchdog
watchdog._GRACE, watchdog._FIRST = 0.2, 1000

def a_loader_that_is_stuck():
    time.sleep(1000)

def a_step_that_hangs():
    threading.Thread(target=a_loader_that_is_stuck, daemon=True).start()
    time.sleep(1000)

with watchdog.watched(0.3, stacks=sys.argv[1]) as dog:
    time.sleep(0.5)
    dog.alive()
    a_step_that_hangs()
"""


def test_a_process_that_stands_still_tells_where_and_ends(tmp_path: Path) -> None:
    stacks = tmp_path / "run" / "stacks" / "rank-0.txt"
    done = subprocess.run([sys.executable, "-c", HANGS, str(stacks)], capture_output=True, text=True, timeout=60)
    assert done.returncode == STALLED
    assert f"no step for 0.3 s; stacks in {stacks}" in done.stderr
    assert "in a_step_that_hangs" in stacks.read_text()
    assert "in a_loader_that_is_stuck" in stacks.read_text()


def test_stacks_that_cannot_be_stored_are_printed_and_the_process_ends_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", HANGS, str(tmp_path / "file" / "stacks.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == STALLED
    assert "in a_step_that_hangs" in done.stderr


def test_one_that_goes_on_lives_and_the_first_step_may_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: pytest.fail("ended"))
    with watched(0.2, stacks=str(tmp_path / "stacks.txt")) as dog:
        time.sleep(0.5)
        for _ in range(10):
            dog.alive()
            time.sleep(0.05)
    assert not (tmp_path / "stacks.txt").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
