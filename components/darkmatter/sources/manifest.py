"""`manifest:/data/list.csv` or `manifest:s3://bucket/list.jsonl`: a list of images, a row each.

Columns (CSV with a head) or keys (JSONL): `path` (or `url`), relative to the list; perhaps `label`; perhaps `split`:
train, val or test. Others are left alone. Whether a remote image has changed is not asked, which would be a request
each: a new version needs a new path.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from darkmatter import remote
from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source, Unreadable

_PATHS = ("path", "url", "file")
_SPLITS = ("train", "val", "test")


class Manifest(Source):
    def __init__(self, address: str) -> None:
        self.address = address
        self.base = address.rpartition("/")[0] or "."

    def items(self) -> Iterator[Item]:
        seen: dict[str, int] = {}
        for number, row in self._rows():
            name = next((str(row[key]) for key in _PATHS if row.get(key)), "")
            if not name:
                yield Item(f"#{number}", place=json.dumps(["no-path", f"line {number} names none"]))
                continue
            split = row.get("split") or None
            if split not in (*_SPLITS, None):
                problem = ["unknown-split", f"{split!r} in line {number}; there is: {', '.join(_SPLITS)}"]
                yield Item(f"{name}#{number}", place=json.dumps(problem))
                continue
            count = seen[name] = seen.get(name, 0) + 1
            label = row.get("label")
            yield Item(
                name if count == 1 else f"{name}#{number}",
                self._version(name),
                None if label in (None, "") else str(label),
                split,
                place=json.dumps(name),
            )

    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        for item in items:
            try:
                place = json.loads(item.place)
                if not isinstance(place, str):
                    raise Unreadable(*place)
                yield remote.read(self._address(place), limit=limit)
            except Unreadable as error:
                yield error

    def _address(self, path: str) -> str:
        """Raises Unreadable for a file of this machine in a list that came from elsewhere."""
        address = remote.join(self.base, path)
        if remote.is_remote(self.address) and remote.is_here(address):
            raise Unreadable("outside", f"{path} is on this machine, and {self.address} is not")
        return address

    def _version(self, path: str) -> str:
        address = remote.join(self.base, path)
        if remote.is_remote(address):
            return ""
        with contextlib.suppress(Unreadable):  # `read` will say what is wrong
            return remote.version(address)
        return "missing"

    def _rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number of the line, its row)."""
        with _text(self.address) as lines:
            if self.address.endswith(".csv"):
                rows = csv.DictReader(lines)
                if rows.fieldnames is None or not set(_PATHS) & set(rows.fieldnames):
                    raise ParamsError(f"source.uri: {self.address} has no column {' or '.join(_PATHS)}")
                for row in rows:
                    yield rows.line_num, row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ParamsError(f"source.uri: line {number} of {self.address} is no JSON: {error}") from error
                    if not isinstance(row, dict):
                        raise ParamsError(f"source.uri: line {number} of {self.address} is no JSON object")
                    yield number, row


@contextlib.contextmanager
def _text(address: str) -> Iterator[io.TextIOBase]:
    if remote.is_remote(address):
        with remote.open_file(address) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
            yield text
    else:
        with open(address, encoding="utf-8", errors="surrogateescape", newline="") as text:
            yield text


def open_source(location: str) -> Manifest:
    if not location.endswith((".csv", ".jsonl")):
        raise ParamsError(f"source.uri: {location!r} is neither .csv nor .jsonl")
    try:
        remote.version(location)
        next(iter(Manifest(location).items()), None)
    except Unreadable as error:
        raise ParamsError(f"source.uri: {error}") from error
    return Manifest(location)
