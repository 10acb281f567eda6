"""Bytes that take too long, too much, or the whole process with them."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from darkmatter import images
from darkmatter.guard import Guard, Limits


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **options)
    return file.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
GOOD = encoded(NOISE)


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard(Limits(max_pixels=100_000_000, seconds=20.0, mebibytes=1024))
    yield made
    made.close()


def process_of(guard: Guard) -> psutil.Process:
    assert guard._process is not None
    return psutil.Process(guard._process.pid)


def reason(guard: Guard, content: bytes) -> str:
    with pytest.raises(images.Rejected) as caught:
        guard.inspect(content)
    return caught.value.reason


def test_it_says_what_inspect_says(guard: Guard) -> None:
    assert guard.inspect(GOOD) == images.inspect(GOOD, max_pixels=10_000)
    for content in (b"", b"no image", GOOD[:300]):
        with pytest.raises(images.Rejected) as direct:
            images.inspect(content, max_pixels=10_000)
        assert reason(guard, content) == direct.value.reason
    assert guard.inspect(encoded(NOISE, "JPEG")).extension == "jpg"


def test_an_image_that_needs_too_much_memory_is_rejected_and_the_next_one_is_not() -> None:
    guard = Guard(Limits(max_pixels=10**9, seconds=60.0, mebibytes=768))
    flat = encoded(np.zeros((13_000, 13_000), np.uint8))
    assert reason(guard, flat) == "too-much-memory"
    assert guard.inspect(GOOD).extension == "png"
    guard.close()


def test_an_image_that_takes_too_long_is_rejected_and_the_next_one_is_not() -> None:
    guard = Guard(Limits(max_pixels=10**9, seconds=20.0, mebibytes=4096))
    assert guard.inspect(GOOD).extension == "png"
    child = process_of(guard)
    assert guard._line is not None
    guard._line.settimeout(0.3)
    child.suspend()  # whatever keeps it from answering
    assert reason(guard, GOOD) == "too-slow"
    assert not child.is_running()
    assert guard.inspect(GOOD).extension == "png"
    guard.close()


def test_a_decoder_that_dies_costs_its_image_and_no_other(guard: Guard) -> None:
    guard.inspect(GOOD)
    child = process_of(guard)
    child.send_signal(signal.SIGSEGV)
    while child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(images.Rejected, match=r"killed-the-decoder: .* SIGSEGV"):
        guard.inspect(GOOD)
    assert guard.inspect(GOOD).extension == "png"


def test_nothing_can_be_written_by_the_one_who_decodes(guard: Guard, tmp_path: Path) -> None:
    guard.inspect(GOOD)
    child = process_of(guard)
    limits = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
    found = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert found["Max file size"] == found["Max core file size"] == "0"
    assert int(found["Max address space"]) == 1024 << 20


def test_it_does_not_outlive_who_asked() -> None:
    script = (
        "import os, sys, psutil; from darkmatter.guard import Guard, Limits; g = Guard(Limits(100, 5.0, 1024))\n"
        "try: g.inspect(b'x')\nexcept Exception: pass\n"
        "print(psutil.Process().children()[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_several_threads_have_guards_of_their_own() -> None:
    guards = [Guard(Limits(10_000, 20.0, 1024)) for _ in range(2)]
    found: list[object] = []
    threads = [threading.Thread(target=lambda g=g: found.append(g.inspect(GOOD))) for g in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [images.inspect(GOOD, max_pixels=10_000)] * 2
    for one in guards:
        one.close()
