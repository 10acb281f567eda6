"""Rows of numbers by step, appended as they come: what people look at, and what MLflow is told later if it is away.

<address>/history.jsonl   a row a line, only ever appended. Steps that a restart did again are there twice; `read` gives
                          each once, `read_all` both, for those who ask where the time went
"""

import json
import sys
import time
from pathlib import Path

from darkmatter import remote

Row = dict[str, float]

_NAME = "history.jsonl"
_PATIENCE = 10.0  # seconds between two writes to an address, which takes whole files only


class History:
    """Of one run; rank 0 appends. A disk or store that is away costs nothing: rows wait in memory."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: of the run.
        """
        self._address = remote.join(address, _NAME)
        self._rows = read_all(address)
        self._waiting: list[Row] = []
        self._written = time.monotonic()
        self._torn = True  # a line that a kill or a full disk cut off must not stand before the next one

    def append(self, row: Row) -> None:
        """At the next chance it is written."""
        self._waiting.append(row)
        if not remote.is_remote(self._address) or time.monotonic() - self._written > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, or says why not."""
        if not self._waiting:
            return
        try:
            if remote.is_remote(self._address) or self._torn:
                remote.write(self._address, _lines(self._rows + self._waiting).encode())
            else:
                with Path(self._address).open("a") as file:
                    file.write(_lines(self._waiting))
        except OSError as error:
            self._torn = True
            print(f"darkmatter: {len(self._waiting)} rows of the history wait ({error})", file=sys.stderr, flush=True)
        else:
            self._rows += self._waiting
            self._waiting, self._torn = [], False
        self._written = time.monotonic()


def read(address: str) -> list[Row]:
    """Each step once, as it was done last; the steps rise.

    Raises:
        Unreadable: the store cannot be reached.
    """
    kept: list[Row] = []
    for row in read_all(address):
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def read_all(address: str) -> list[Row]:
    """All complete rows as they were written; a last line cut off by a kill is left out.

    Raises:
        Unreadable: as `read`.
    """
    try:
        content = remote.read(remote.join(address, _NAME), limit=2**31).decode()
    except remote.Unreadable as error:
        if error.reason != "missing":
            raise
        return []
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
