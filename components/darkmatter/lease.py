"""A lease: one driver at a time trains a run, or runs the jobs of a branch.

A file beside the checkpoints says who holds it, and is written anew as long as its holder lives. It needs no more of a
store than to read and to write whole files. What that leaves open: of two drivers that start within the same second both
may begin; the one whose lease was overwritten finds out at its next renewal and ends. Their checkpoints are the same.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from darkmatter import remote
from darkmatter.beside import beside
from darkmatter.console import Stopped

LOST = 76  # exit status of a driver whose lease another one has taken

_RENEW, _EXPIRE, _SETTLE = 5.0, 30.0, 0.5  # seconds


class Held(Stopped):
    """Another driver has the lease."""


@contextmanager
def held(address: str, *, doing: str = "trains this run") -> Iterator[None]:
    """The lease at this address is ours within the block; `doing` says in messages what its holder does.

    Raises:
        Held: by a driver that lives.
        Unreadable: the store cannot be reached.
    """
    lease = _Lease(address, doing)
    lease.take()
    try:
        with beside(lease.renew, "lease"):
            yield
    finally:
        lease.give_back()


class _Lease:
    def __init__(self, address: str, doing: str) -> None:
        self._address, self._doing = remote.join(address, "lease.json"), doing
        self._mine = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
        }

    def take(self) -> None:
        other = self._read()
        if other is not None and not self._is_gone(other):
            self._wait_for_a_sign_of(other)
        self._write()
        time.sleep(_SETTLE)
        if (found := self._read()) is not None and found["token"] != self._mine["token"]:
            raise self._held(found)

    def renew(self, done: threading.Event) -> None:
        while not done.wait(_RENEW):
            try:
                found = self._read()
                if found is not None and found["token"] != self._mine["token"]:
                    print(f"darkmatter: {self._held(found)}; this one ends", file=sys.stderr, flush=True)
                    os._exit(LOST)
                self._write()
            except remote.Unreadable as error:  # away for a while: whoever wants the lease cannot read it either
                print(f"darkmatter: the lease could not be renewed ({error})", file=sys.stderr, flush=True)

    def give_back(self) -> None:
        found = self._read()
        if found is not None and found["token"] == self._mine["token"]:
            remote.remove(self._address)

    def _wait_for_a_sign_of(self, other: dict[str, Any]) -> None:
        """Returns when there is none for as long as a lease lasts. Clocks of two machines are not compared."""
        print(f"waiting for a sign of life of {_name(other)}, who has the lease {self._address}", flush=True)
        deadline = time.monotonic() + _EXPIRE
        while time.monotonic() < deadline:
            time.sleep(_SETTLE)
            found = self._read()
            if found is None:
                return
            if found != other:
                raise self._held(found)

    def _is_gone(self, other: dict[str, Any]) -> bool:
        """A process of this machine that is no more."""
        if other["host"] != self._mine["host"]:
            return False
        try:
            return psutil.Process(other["pid"]).create_time() != other["started"]
        except psutil.NoSuchProcess:
            return True

    def _held(self, other: dict[str, Any]) -> Held:
        return Held(f"{_name(other)} {self._doing} ({self._address}); wait for it, or end it first")

    def _read(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(remote.read(self._address, limit=2**16))
        except remote.Unreadable as error:
            if error.reason != "missing":
                raise
            return None
        return found

    def _write(self) -> None:
        remote.write(self._address, json.dumps({**self._mine, "renewed": time.time()}).encode())


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"
