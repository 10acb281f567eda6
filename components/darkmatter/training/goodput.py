"""Where the time of a run went: how much of it trained the model that there is now, and what took the rest."""

import time
from collections.abc import Iterable, Mapping

from darkmatter.training.history import Row

CAUSES = ("step", "data", "evaluation", "save")
"""What the loop does, one after the other. A row of the history has the seconds of each since the one before."""


class Clock:
    """Of one process: the time since the last call went to a cause."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = dict.fromkeys(CAUSES, 0.0)

    def spent(self, cause: str) -> None:
        """The time since the last call, or since the beginning, went to `cause`."""
        now = time.monotonic()
        self._seconds[cause] += now - self._last
        self._last = now

    def read(self) -> Row:
        """Seconds by cause since the last reading."""
        row = {f"seconds_{cause}": round(seconds, 4) for cause, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        return row


def shares(rows: Iterable[Mapping[str, float]], *, ended: float) -> dict[str, float]:
    """Fractions of the wall time of all sessions together, which add up to 1.

    A session is one call of the stage; the time between two, when nothing ran, counts for nothing. Of a session that was
    killed nothing is known after its last row.

    Args:
        rows: all rows of the history, those of steps that were done again included. Each has `step`, the time it was
            written (`time`), the time its session began (`session`) and the seconds by cause.
        ended: when the last session ended; times are seconds since 1970.

    Returns:
        `step`: steps that count. `data`: waiting for it. `evaluation`: looks at held-out data. `save`: what the loop waited
        for. `start`: to the first step of the first session, and what the end of the last takes. `recovery`: starts after a
        failure, and the steps that were done again. `wall_seconds`: the whole.
    """
    rows = list(rows)
    spent = dict.fromkeys((*CAUSES, "start", "recovery"), 0.0)
    wall, last, session = 0.0, 0.0, None
    for row, redone in zip(rows, _done_again(rows), strict=True):
        if row["session"] != session:
            session, last = row["session"], row["session"]
            first = not wall
        seconds = {cause: row[f"seconds_{cause}"] for cause in CAUSES}
        elapsed = row["time"] - last
        # What lies before this row's own work: a process group that was built, a model, the first batch of a restart.
        idle = max(0.0, elapsed - sum(seconds.values()))
        spent["start" if first and last == session else "recovery"] += idle
        for cause, value in seconds.items():
            spent["recovery" if redone else cause] += value
        wall += elapsed
        last = row["time"]
    if rows:
        spent["start"] += ended - last
        wall += ended - last
    total = max(wall, 1e-9)
    return {**{name: round(value / total, 4) for name, value in spent.items()}, "wall_seconds": round(wall, 1)}


def _done_again(rows: list[Mapping[str, float]]) -> list[bool]:
    """Of each row whether a later one did its steps again."""
    again, least = [], float("inf")
    for row in reversed(rows):
        again.append(row["step"] >= least)
        least = min(least, row["step"])
    return again[::-1]
