import json
import os
from pathlib import Path

import pytest
from hostile import picture

from darkmatter import params
from darkmatter.sources import Unreadable, manifest


def read(path: Path) -> dict[str, tuple[bytes | str, str | None, str | None]]:
    """Name -> (bytes or the reason why there are none, label, split)."""
    source = manifest.open_source(str(path))
    items = list(source.items())
    answers = source.read(items, limit=10_000)
    return {
        item.name: (one.reason if isinstance(one, Unreadable) else one, item.label, item.split)
        for item, one in zip(items, answers, strict=True)
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def test_a_csv_with_labels_and_splits(pictures: Path) -> None:
    rows = [
        "path,label,split,other",
        "pictures/0.png,cat,train,x",
        '"pictures/1.png","a, b",test,',
        "pictures/2.png,,,",
    ]
    (pictures / "list.csv").write_text("\n".join([*rows, f"{pictures}/pictures/3.png,dog,val,"]))
    assert read(pictures / "list.csv") == {
        "pictures/0.png": (picture(0), "cat", "train"),
        "pictures/1.png": (picture(1), "a, b", "test"),
        "pictures/2.png": (picture(2), None, None),
        f"{pictures}/pictures/3.png": (picture(3), "dog", "val"),
    }


def test_jsonl_and_what_is_wrong_in_single_rows(pictures: Path) -> None:
    rows = [
        {"path": "pictures/0.png", "label": 3},
        {"path": "pictures/gone.png"},
        {"path": "pictures/0.png", "label": 4},
        {"label": "nobody"},
        {"path": "pictures/1.png", "split": "holdout"},
        {"url": "pictures/2.png"},
    ]
    (pictures / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(pictures / "list.jsonl") == {
        "pictures/0.png": (picture(0), "3", None),
        "pictures/gone.png": ("missing", None, None),
        "pictures/0.png#3": (picture(0), "4", None),
        "#4": ("no-path", None, None),
        "pictures/1.png#5": ("unknown-split", None, None),
        "pictures/2.png": (picture(2), None, None),
    }


def test_a_picture_that_changes_has_another_version(pictures: Path) -> None:
    (pictures / "list.csv").write_text("path\npictures/0.png\n")
    source = manifest.open_source(str(pictures / "list.csv"))
    before = source.state()
    os.utime(pictures / "pictures" / "0.png", (1, 1))
    assert source.state() != before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "neither .csv nor .jsonl"),
        ("a.csv", "name\nx\n", "has no column path or url or file"),
        ("a.csv", "", "has no column"),
        ("a.jsonl", '{"path": \n', "line 1 .* is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 .* is no JSON object"),
    ],
)
def test_a_list_that_cannot_be_one_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(params.ParamsError, match=message):
        manifest.open_source(str(tmp_path / name))


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(params.ParamsError, match="missing"):
        manifest.open_source(str(tmp_path / "list.csv"))
