"""Checkpoints: whole or absent, checked when read, the newest good one wins.

<folder>/step-0000120/state.pt   tensors and numbers only (read with weights_only=True)
                      sha256     of state.pt: no format notices a flipped bit by itself (measured, 0 of 40)
<folder>/history.jsonl           rows up to the newest step; rows after the checkpoint are cut off at resume
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from darkmatter import files

_KEEP = 2  # the newest, and one to fall back on when the newest is damaged


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes the checkpoint of a step and drops all but the newest two."""
    with files.whole_folder(folder / f"step-{step:07d}") as temporary:
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        files.write(temporary / "sha256", files.sha256(temporary / "state.pt"))
    for old in _newest_first(folder)[_KEEP:]:
        files.remove_folder(old)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole; None when there is none. Damaged ones are named on stderr."""
    for path in _newest_first(folder):
        state, recorded = path / "state.pt", path / "sha256"
        if state.is_file() and recorded.is_file() and files.sha256(state) == recorded.read_text():
            return torch.load(state, map_location="cpu", weights_only=True)
        print(f"darkmatter: checkpoint {path} is damaged; using the one before it", file=sys.stderr)
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


class History:
    """Rows of numbers by step, appended as they come. After a resume each step is there once."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Keeps the rows up to `step`, which is where training goes on, and drops the rest."""
        self.path = folder / "history.jsonl"
        rows = [row for row in read_history(folder) if row["step"] <= step]
        files.write(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_history(folder: Path) -> list[dict[str, float]]:
    """All complete rows; a last line cut off by a kill is left out."""
    path = folder / "history.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
