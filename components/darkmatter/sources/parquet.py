"""`parquet:/data/*.parquet`, `parquet:s3://bucket`: tables with a column of encoded images, as Hugging Face's are.

The column of images is bytes, or a struct with a field `bytes`; a column `label` or `cls` is the label, by its names
where the table has Hugging Face's. Others are named behind `#`: `parquet:/data/a.parquet#image=photo&label=kind`.
"""

import contextlib
import dataclasses
import json
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from darkmatter import remote
from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source, Unreadable, digest

_ROWS = 64  # read at once, so that memory is bounded by them and not by a row group
_LABELS = ("label", "labels", "cls", "class")


@dataclasses.dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    names: tuple[str, ...] = ()
    """Of the labels, where the table holds their numbers."""


class Parquet(Source):
    def __init__(self, address: str, wanted: dict[str, str]) -> None:
        self.address, self.wanted = address, wanted

    def _tables(self) -> list[tuple[str, str]]:
        """(address, version) of each."""
        found = remote.files_of(self.address, ".parquet")
        if not found:
            raise Unreadable("missing", f"{self.address} stands for no .parquet")
        return found

    def state(self) -> str:
        return digest(f"{address}\0{version}" for address, version in self._tables())

    def columns(self) -> _Columns:
        """Those of the first table. Raises ParamsError where they cannot be told."""
        address, _ = self._tables()[0]
        with _opened(address) as table:
            return _columns(table.schema_arrow, self.wanted, address)

    def items(self) -> Iterator[Item]:
        for address, version in self._tables():
            base = address.rsplit("/", 1)[-1]
            try:
                with _opened(address) as table:
                    columns = _columns(table.schema_arrow, self.wanted, address)
                    for group in range(table.metadata.num_row_groups):
                        yield from _rows(table, group, columns, address, base, version)
            except Unreadable as error:
                yield Item(f"{base}!", version, place=json.dumps({"problem": [error.reason, error.detail]}))

    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        places = [json.loads(item.place) for item in items]
        found: dict[tuple[str, int], dict[int, bytes | Unreadable]] = {}
        for place in places:
            if "problem" in place:
                yield Unreadable(*place["problem"])
                continue
            key = place["table"], place["group"]
            if key not in found:
                wanted = {one["row"] for one in places if (one.get("table"), one.get("group")) == key}
                found = {key: _contents(*key, wanted, self.wanted, limit)}  # one group at a time
            yield found[key][place["row"]]


def _rows(table: Any, group: int, columns: _Columns, address: str, base: str, version: str) -> Iterator[Item]:
    count = table.metadata.row_group(group).num_rows
    labels: list[Any] = [None] * count
    if columns.label:
        with _named(address):
            labels = table.read_row_group(group, columns=[columns.label]).column(0).to_pylist()
    for row, value in enumerate(labels):
        known = columns.names and isinstance(value, int) and 0 <= value < len(columns.names)
        label = None if value is None else columns.names[value] if known else str(value)
        place = json.dumps({"table": address, "group": group, "row": row})
        yield Item(f"{base}!{group:06d}/{row:06d}", version, label, place=place)


def _contents(
    address: str, group: int, wanted: set[int], named: dict[str, str], limit: int
) -> dict[int, bytes | Unreadable]:
    """The images of these rows of a group; what cannot be had, and why."""
    result: dict[int, bytes | Unreadable] = {}
    try:
        with _opened(address) as table:
            columns = _columns(table.schema_arrow, named, address)
            row = 0
            with _named(address):
                for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[columns.image]):
                    for value in batch.column(0):
                        if row in wanted:
                            result[row] = _bytes(value, limit)
                        row += 1
    except Unreadable as error:
        return {row: result.get(row, error) for row in wanted}
    return result


def _bytes(value: Any, limit: int) -> bytes | Unreadable:
    import pyarrow as pa

    if pa.types.is_struct(value.type):
        if not value.is_valid or not value["bytes"].is_valid:
            return Unreadable("no-image", "the row holds no bytes, perhaps a path: bytes are needed")
        value = value["bytes"]
    if not value.is_valid:
        return Unreadable("no-image", "the row holds no bytes")
    buffer = value.as_buffer()
    if buffer.size > limit:
        return Unreadable("too-large", f"{buffer.size} bytes, over the limit of {limit}")
    return bytes(buffer)


def _columns(schema: Any, wanted: dict[str, str], address: str) -> _Columns:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [field.name for field in schema if holds_bytes(field.type)]
    for key, name in wanted.items():
        if name not in schema.names:
            raise ParamsError(
                f"source.uri: {address} has no column {name!r} ({key}); it has: {', '.join(schema.names)}"
            )
    image = wanted.get("image") or ("image" if "image" in images else None)
    if image is None and len(images) != 1:
        raise ParamsError(
            f"source.uri: which column of {address} holds the images? "
            f"{', '.join(images) or 'None'} could; name it: ...#image=NAME"
        )
    label = wanted.get("label") or next((name for name in _LABELS if name in schema.names), None)
    return _Columns(image or images[0], label, _class_names(schema, label))


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Hugging Face's names of classes, in the metadata of the table."""
    text = (schema.metadata or {}).get(b"huggingface")
    if not text or label is None:
        return ()
    try:
        return tuple(json.loads(text)["info"]["features"][label]["names"])
    except (ValueError, KeyError, TypeError):  # other features, or another version's layout
        return ()


@contextlib.contextmanager
def _opened(address: str) -> Iterator[Any]:
    import pyarrow.parquet

    with _named(address):
        file = remote.open_file(address) if remote.is_remote(address) else open(address, "rb")  # noqa: SIM115
    with file:
        with _named(address):
            table = pyarrow.parquet.ParquetFile(file)
        yield table


@contextlib.contextmanager
def _named(address: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except Unreadable:
        raise
    except (pa.ArrowException, OSError) as error:
        raise Unreadable("damaged-table", f"{address}: {error}") from error


def open_source(location: str) -> Parquet:
    address, _, options = location.partition("#")
    wanted = dict(urllib.parse.parse_qsl(options))
    if unknown := set(wanted) - {"image", "label"}:
        raise ParamsError(f"source.uri: {', '.join(sorted(unknown))} behind # is unknown; there is: image, label")
    source = Parquet(address, wanted)
    try:
        source.columns()
    except Unreadable as error:
        raise ParamsError(f"source.uri: {error}") from error
    return source
