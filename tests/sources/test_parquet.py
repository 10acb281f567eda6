import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import picture

from darkmatter import params
from darkmatter.sources import Unreadable, parquet

Found = list[tuple[bytes | str, str | None]]


def read(location: str, *, limit: int = 10_000) -> Found:
    source = parquet.open_source(location)
    items = list(source.items())
    assert len({item.name for item in items}) == len(items)
    answers = source.read(items, limit=limit)
    return [
        (one.reason if isinstance(one, Unreadable) else one, item.label)
        for item, one in zip(items, answers, strict=True)
    ]


def write(path: Path, columns: dict[str, Any], *, metadata: dict[str, str] | None = None, rows: int = 2) -> str:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return str(path)


def test_hugging_faces_layout_with_the_names_of_its_classes(tmp_path: Path) -> None:
    image = pa.array([{"bytes": picture(n), "path": f"{n}.png"} for n in range(5)])
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    location = write(tmp_path / "a.parquet", {"image": image, "label": [0, 1, 0, None, 1]}, metadata=metadata)
    labels = ["cat", "dog", "cat", None, "dog"]
    assert read(location) == [(picture(n), label) for n, label in enumerate(labels)]


def test_a_column_of_bytes_and_labels_of_any_type(tmp_path: Path) -> None:
    location = write(tmp_path / "a.parquet", {"photo": [picture(n) for n in range(3)], "label": ["x", "y", "x"]})
    assert read(location) == [(picture(0), "x"), (picture(1), "y"), (picture(2), "x")]
    location = write(tmp_path / "b.parquet", {"photo": pa.array([picture(0)], pa.large_binary()), "n": [7]})
    assert read(location) == [(picture(0), None)]
    assert read(f"{location}#image=photo&label=n") == [(picture(0), "7")]


def test_rows_without_bytes_and_rows_that_are_too_large(tmp_path: Path) -> None:
    image = pa.array([{"bytes": None, "path": "/etc/passwd"}, None, {"bytes": bytes(2000), "path": None}])
    location = write(tmp_path / "a.parquet", {"image": image})
    assert read(location, limit=1000) == [("no-image", None), ("no-image", None), ("too-large", None)]


def test_some_items_of_several_groups_in_their_order(tmp_path: Path) -> None:
    location = write(tmp_path / "a.parquet", {"image": [picture(n) for n in range(200)]}, rows=90)
    source = parquet.open_source(location)
    items = list(source.items())
    chosen = np.random.default_rng(0).permutation(200)[:50].tolist()
    answers = source.read([items[n] for n in sorted(chosen)], limit=10_000)
    assert list(answers) == [picture(n) for n in sorted(chosen)]


def test_several_tables_and_a_damaged_one(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / f"{n}.parquet", {"image": [picture(n)]})
    content = bytearray((tmp_path / "1.parquet").read_bytes())
    (tmp_path / "1.parquet").write_bytes(content[:-8])
    expected = [(picture(0), None), ("damaged-table", None), (picture(2), None)]
    assert read(str(tmp_path)) == read(f"{tmp_path}/*.parquet") == expected


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [np.random.default_rng(n).integers(0, 4, 9000, np.uint8).tobytes() for n in range(4)]})
    pq.write_table(table, path, compression="zstd", row_group_size=2)
    content = bytearray(path.read_bytes())
    content[100:3000] = bytes(2900)
    path.write_bytes(bytes(content))
    assert [answer for answer, _ in read(str(path))][:2] == ["damaged-table"] * 2


def test_what_cannot_be_told_has_to_be_said(tmp_path: Path) -> None:
    two = write(tmp_path / "two.parquet", {"a": [b"x"], "b": [b"y"]})
    with pytest.raises(params.ParamsError, match=r"which column.*a, b could; name it: ...#image=NAME"):
        parquet.open_source(two)
    with pytest.raises(params.ParamsError, match="has no column 'c'"):
        parquet.open_source(f"{two}#image=c")
    with pytest.raises(params.ParamsError, match="colour behind # is unknown"):
        parquet.open_source(f"{two}#colour=c")
    with pytest.raises(params.ParamsError, match="None could"):
        parquet.open_source(write(tmp_path / "none.parquet", {"a": [1]}))
    with pytest.raises(params.ParamsError, match="missing"):
        parquet.open_source(str(tmp_path / "nothing.parquet"))


def test_no_column_of_python_objects_is_ever_unpickled(tmp_path: Path) -> None:
    """Bytes stay bytes: a pickle in the column is an image that cannot be decoded, and nothing else."""
    import pickle

    file = io.BytesIO()
    pickle.dump({"a": 1}, file)
    location = write(tmp_path / "a.parquet", {"image": [file.getvalue()]})
    assert read(location) == [(file.getvalue(), None)]
