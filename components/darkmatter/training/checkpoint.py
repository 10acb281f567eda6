"""Checkpoints: whole or absent, compared with their hash when read; the newest good one wins.

<address>/step-0000120/state.pt         tensors and numbers only (read with weights_only=True), for any number of ranks
                       checkpoint.json  its step, its energy margin and the sha256 of state.pt: no format notices a flipped
                                        bit by itself (measured, 0 of 40). Written last: a folder without it is not one
"""

import hashlib
import io
import json
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from darkmatter import files, remote
from darkmatter.training import guards

STATE, ABOUT = "state.pt", "checkpoint.json"


class Checkpoints:
    """Those of one run, in a folder of this machine or below an address that fsspec knows (`s3://bucket/folder`)."""

    def __init__(self, address: str, *, keep: int) -> None:
        """
        Args:
            address: of the run.
            keep: how many of the newest stay; beside them stays the one with the best energy margin.
        """
        self.address = address
        self._keep = keep

    def save(self, step: int, state: dict[str, Any], energy_margin: float | None = None) -> None:
        """Writes the checkpoint of a step, then drops those that need not stay.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        name = f"step-{step:07d}"
        with self._filling(name) as folder:
            with (folder / STATE).open("wb") as file:
                hashing: Any = _Hashing(file)
                torch.save(state, hashing)  # through an open file it leaves the interpreter's lock free (measured)
                file.flush()
                os.fsync(file.fileno())
            about = {"step": step, "energy_margin": energy_margin, "sha256": {STATE: hashing.sha256()}}
            files.write_json(folder / ABOUT, about)
        for old in self._spare():
            remote.remove_folder(remote.join(self.address, old))

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole; None when there is none. Damaged ones are named on stderr.

        Raises:
            Unreadable: the store cannot be reached.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except ValueError as error:
                print(f"darkmatter: {error}; using the one before it", file=sys.stderr)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """The state of the checkpoint of a step.

        Raises:
            ValueError: it is damaged, or there is none.
            Unreadable: the store cannot be reached.
        """
        name = f"step-{step:07d}"
        place = remote.join(self.address, name)
        try:
            with self._fetched(place) as path, path.open("rb") as file:
                expected = self._about(name)["sha256"][STATE]
                if hashlib.file_digest(file, "sha256").hexdigest() == expected:
                    return torch.load(path, map_location="cpu", weights_only=True)
                problem = "its bytes are not those that were written"
        except (remote.Unreadable, ValueError, KeyError, TypeError) as error:
            if isinstance(error, remote.Unreadable) and error.reason == "connection":
                raise
            problem = str(error)
        except (pickle.UnpicklingError, RuntimeError) as error:  # weights_only refused it: somebody else wrote it
            problem = f"it holds something else than tensors and numbers: {str(error).splitlines()[0][:200]}"
        raise ValueError(f"checkpoint {place} is damaged ({problem})")

    def steps(self) -> list[int]:
        """Of those that are complete, in rising order. Whether their bytes are good, `load` finds out."""
        return sorted(int(name[5:]) for name in self._names())

    def newest_step(self) -> int:
        """Of those that are complete; 0 when there is none. Whether its bytes are good, `load_newest` finds out."""
        return next(reversed(self.steps()), 0)

    def _names(self) -> list[str]:
        """Newest first."""
        try:
            paths = [entry.path for entry in remote.listing(self.address)]
        except remote.Unreadable as error:
            if error.reason != "missing":
                raise
            return []
        found = (re.fullmatch(rf"(step-\d{{7,}})/{re.escape(ABOUT)}", path) for path in paths)
        return sorted((match[1] for match in found if match), key=lambda name: int(name[5:]), reverse=True)

    def _about(self, name: str) -> dict[str, Any]:
        about: dict[str, Any] = json.loads(remote.read(remote.join(self.address, f"{name}/{ABOUT}"), limit=2**16))
        return about

    def _spare(self) -> list[str]:
        """Neither among the newest nor the best."""
        names = self._names()
        margins = {}
        for name in names:
            try:
                margins[name] = self._about(name)["energy_margin"] or 0.0
            except (ValueError, KeyError, TypeError):
                margins[name] = 0.0  # damaged: it is told of when it is loaded
        best = max(names, key=lambda name: (margins[name], name), default=None)
        return [name for name in names[self._keep :] if name != best]

    @contextmanager
    def _filling(self, name: str) -> Iterator[Path]:
        """A folder of this machine whose files take their place when the block ends well."""
        place = remote.join(self.address, name)
        if not remote.is_remote(place):
            with files.whole_folder(place) as folder:
                yield folder
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
            yield Path(temporary)
            for one in (STATE, ABOUT):
                remote.send(Path(temporary) / one, f"{place}/{one}")

    @contextmanager
    def _fetched(self, place: str) -> Iterator[Path]:
        """The state's file on this machine."""
        if not remote.is_remote(place):
            if not (Path(place) / STATE).is_file():
                raise remote.Unreadable("missing", f"no {STATE}")
            yield Path(place) / STATE
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
            remote.fetch(f"{place}/{STATE}", Path(temporary) / STATE)
            yield Path(temporary) / STATE


class Saver:
    """Saves beside the training: the loop waits for a copy of the state only, and for the save before, if it is not done.

    A save that fails is told of and counted, and training goes on; the next one may do better. Only the last one, when the
    block ends well, must succeed.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copy: Any = None
        self.failed = 0
        """Saves that could not be written."""

    def save(self, step: int, state: dict[str, Any], energy_margin: float | None = None) -> None:
        """Copies the state and writes it later; the copy is on the CPU and is used again.

        Raises:
            NotFinite: a weight or another number of the state that was to be saved last. It was not written.
        """
        self._settle(last=False)
        self._copy = _copied(state, self._copy)
        self._pending = self._pool.submit(self._write, step, energy_margin)

    def _write(self, step: int, energy_margin: float | None) -> None:
        guards.require_finite(self._copy, step)
        self._checkpoints.save(step, self._copy, energy_margin)

    def _settle(self, *, last: bool) -> None:
        """Waits for the save that is being written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
            if last:
                raise
            self.failed += 1
            print(
                f"darkmatter: a checkpoint could not be saved ({error}); training goes on", file=sys.stderr, flush=True
            )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._settle(last=kind is None)
        finally:
            self._pool.shutdown()


def _copied(value: Any, into: Any) -> Any:
    """A deep copy on the CPU, in the tensors of an earlier one where they fit."""
    if isinstance(value, Tensor):
        if not (isinstance(into, Tensor) and into.shape == value.shape and into.dtype == value.dtype):
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value.detach())
    if isinstance(value, dict):
        into = into if isinstance(into, dict) else {}
        return {key: _copied(one, into.get(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        into = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)(_copied(one, old) for one, old in zip(value, into, strict=True))
    return value


class _Hashing(io.RawIOBase):
    """A file to write whose hash is known at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._hash.update(content)
        return self._file.write(content)

    def sha256(self) -> str:
        return self._hash.hexdigest()
