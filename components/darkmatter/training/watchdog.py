"""Notices that nothing goes on: writes down where every thread stands and ends the process, so that it is started again."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from darkmatter import remote
from darkmatter.beside import beside

STALLED = 71  # exit status of a process that ended itself
_GRACE = 5.0  # seconds between the stacks and the end: the other ranks, which wait for this one, write theirs meanwhile
_FIRST = 10.0  # the first step may take so many times as long: it compiles, and fills caches


@contextmanager
def watched(seconds: float, *, stacks: str) -> Iterator["Watchdog"]:
    """If the block does not call `alive` for so long, its process is ended with status `STALLED`.

    Args:
        seconds: of patience between two calls of `alive`; ten times as long before the first.
        stacks: address of the file for the stacks of all threads.
    """
    dog = Watchdog(seconds, stacks)
    with beside(dog.watch, "watchdog"):
        yield dog


class Watchdog:
    """Of one process."""

    def __init__(self, seconds: float, stacks: str) -> None:
        self._seconds, self._stacks = seconds, stacks
        self._deadline = time.monotonic() + _FIRST * seconds

    def alive(self) -> None:
        """A step is done."""
        self._deadline = time.monotonic() + self._seconds

    def watch(self, done: threading.Event) -> None:
        while not done.wait(min(1.0, self._seconds / 10)):  # the deadline of the first step is moved nearer by it
            if time.monotonic() < self._deadline:
                continue
            with tempfile.TemporaryFile() as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            print(f"darkmatter: no step for {self._seconds:g} s; stacks in {self._stacks}", file=sys.stderr, flush=True)
            try:
                remote.write(self._stacks, stacks)
            except remote.Unreadable as error:  # it may be why nothing goes on
                print(f"{error}; the stacks are\n{stacks.decode()}", file=sys.stderr, flush=True)
            if not done.wait(_GRACE):
                os._exit(STALLED)
