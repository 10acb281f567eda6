"""On files in the data sets' own formats, which the tests write; their checks of MD5 and of sizes are told so."""

import hashlib
import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from hostile import picture
from PIL import Image

from darkmatter import params
from darkmatter.sources import Unreadable
from darkmatter.sources import torchvision as ours


def read(location: str) -> list[tuple[str, bytes | str, str | None, str | None]]:
    """(name, bytes or the reason why there are none, label, split)."""
    ours._opened.cache_clear()
    source = ours.open_source(location)
    items = list(source.items())
    answers = source.read(items, limit=100_000)
    return [
        (item.name, one.reason if isinstance(one, Unreadable) else one, item.label, item.split)
        for item, one in zip(items, answers, strict=True)
    ]


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_cifar10_in_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)

    def put(name: str, content: dict) -> tuple[str, str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return name, hashlib.md5(raw).hexdigest()

    train = [put(f"data_batch_{n + 1}", {"data": data[n : n + 1].reshape(1, -1), "labels": [n % 2]}) for n in range(5)]
    test = [put("test_batch", {"data": data[5:].reshape(1, -1), "labels": [1]})]
    name, digest = put("batches.meta", {"label_names": ["plane", "car"]})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [list(one) for one in train])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [list(one) for one in test])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    found = read(f"CIFAR10#root={tmp_path}")
    assert [(name, label, split) for name, _, label, split in found] == [
        *((f"train/{n:07d}", ["plane", "car"][n % 2], None) for n in range(5)),
        ("test/0000000", "car", "test"),
    ]
    for (_, content, _, _), image in zip(found, data, strict=True):
        assert (pixels(content) == image.transpose(1, 2, 0)).all()


def test_stl10_with_its_unlabelled_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    contents = {
        "unlabeled_X.bin": data[:2].tobytes(), "train_X.bin": data[2:3].tobytes(), "train_y.bin": bytes([3]),
        "test_X.bin": data[3:].tobytes(), "test_y.bin": bytes([10]), "fold_indices.txt": b"",
        "class_names.txt": b"\n".join(b"%d" % n for n in range(10)),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    found = read(f"STL10#root={tmp_path}")
    assert [(name, label, split) for name, _, label, split in found] == [
        ("unlabeled/0000000", None, None),
        ("unlabeled/0000001", None, None),
        ("train/0000000", "2", None),
        ("test/0000000", "9", "test"),
    ]
    for (_, content, _, _), image in zip(found, data, strict=True):
        assert (pixels(content) == image.transpose(2, 1, 0)).all()  # columns come first in its files


def test_food101_gives_the_bytes_of_its_files(tmp_path: Path) -> None:
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    lists = {"train": {"pie": ["pie/1", "pie/2"]}, "test": {"pie": ["pie/3"], "soup": ["soup/4"]}}
    for split, classes in lists.items():
        (base / "meta" / f"{split}.json").write_text(json.dumps(classes))
        for names in classes.values():
            for name in names:
                path = base / "images" / f"{name}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(int(name[-1]), kind="JPEG"))
    assert read(f"Food101#root={tmp_path}") == [
        ("train/0000000", picture(1, kind="JPEG"), "pie", None),
        ("train/0000001", picture(2, kind="JPEG"), "pie", None),
        ("test/0000000", picture(3, kind="JPEG"), "pie", "test"),
        ("test/0000001", picture(4, kind="JPEG"), "soup", "test"),
    ]


def test_mnist_in_idx_files(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for prefix, part, labels in (("train", data[:2], [7, 1]), ("t10k", data[2:], [4])):
        head = struct.pack(">IIII", 0x803, len(part), 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + part.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(part)) + bytes(labels))
    found = read(f"MNIST#root={tmp_path}")
    assert [(label, split) for _, _, label, split in found] == [
        ("7 - seven", None),
        ("1 - one", None),
        ("4 - four", "test"),
    ]
    assert all((pixels(content) == image).all() for (_, content, _, _), image in zip(found, data, strict=True))


def test_names_that_do_not_exist_are_refused_with_the_list() -> None:
    with pytest.raises(params.ParamsError, match=r"no torchvision:Cifar. There is: CIFAR10, CIFAR100"):
        ours.open_source("Cifar")
    with pytest.raises(params.ParamsError, match="folder behind # is unknown"):
        ours.open_source("CIFAR10#folder=x")


def test_every_name_is_one_of_torchvisions_with_these_parts() -> None:
    import inspect

    for name, parts in ours._PARTS.items():
        options = inspect.signature(getattr(torchvision.datasets, name)).parameters
        assert all(set(part) <= set(options) for part in parts), name


def test_without_files_and_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(Unreadable, match=r"CIFAR10 is not in .* and cannot be downloaded"):
        read(f"CIFAR10#root={tmp_path}")
