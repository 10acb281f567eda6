"""Notices that nothing goes on: writes down where every thread stands and ends the process, so that it is started again."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from types import TracebackType

from darkmatter import remote

STALLED = 71  # exit status of a process that ended itself
_GRACE = 5.0  # seconds between the stacks and the end: the other ranks, which wait for this one, write theirs meanwhile
_FIRST = 10.0  # the first step may take so many times as long: it compiles, and fills caches


class Watchdog:
    """Of one process. Whoever does not call `alive` for `seconds` is ended with status `STALLED`."""

    def __init__(self, seconds: float, *, stacks: str) -> None:
        """
        Args:
            seconds: of patience between two calls of `alive`; ten times as long before the first.
            stacks: address of the file for the stacks of all threads.
        """
        self._seconds, self._stacks = seconds, stacks
        self._deadline = time.monotonic() + _FIRST * seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """A step is done."""
        self._deadline = time.monotonic() + self._seconds

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 10)):  # the deadline of the first step is moved nearer by it
            if time.monotonic() < self._deadline:
                continue
            with tempfile.TemporaryFile() as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
            print(f"darkmatter: no step for {self._seconds:g} s; stacks in {self._stacks}", file=sys.stderr, flush=True)
            remote.write(self._stacks, stacks)
            if not self._done.wait(_GRACE):
                os._exit(STALLED)
