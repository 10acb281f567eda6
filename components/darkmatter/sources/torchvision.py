"""`torchvision:CIFAR10` or `torchvision:STL10#root=/data`: torchvision's data sets by name, downloaded if need be.

Their test part is the test split, all else is for training (of STL10 the unlabelled part too). Where a data set keeps
image files their bytes are taken, where it keeps arrays they become PNG. torchvision unpickles CIFAR's files after it
has checked their MD5.
"""

import dataclasses
import functools
import io
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from darkmatter import remote
from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source, Unreadable, digest

_ROOT = "data/torchvision"
_TRAIN: tuple[Mapping[str, Any], ...] = ({"train": True}, {"train": False})
_SPLIT: tuple[Mapping[str, Any], ...] = ({"split": "train"}, {"split": "test"})

#: The options that name each part of a data set; the one of the test part is the last.
_PARTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "CIFAR10": _TRAIN,
    "CIFAR100": _TRAIN,
    "DTD": ({"split": "train"}, {"split": "val"}, {"split": "test"}),
    "FGVCAircraft": ({"split": "trainval"}, {"split": "test"}),
    "FashionMNIST": _TRAIN,
    "Flowers102": ({"split": "train"}, {"split": "val"}, {"split": "test"}),
    "Food101": _SPLIT,
    "GTSRB": _SPLIT,
    "KMNIST": _TRAIN,
    "MNIST": _TRAIN,
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "STL10": ({"split": "unlabeled"}, {"split": "train"}, {"split": "test"}),
    "SVHN": ({"split": "train"}, {"split": "extra"}, {"split": "test"}),
}


@dataclasses.dataclass(frozen=True)
class TorchVision(Source):
    name: str
    root: str

    def items(self) -> Iterator[Item]:
        parts = _PARTS[self.name]
        for part, options in enumerate(parts):
            data = _opened(self.name, self.root, part)
            split: Literal["train", "test"] = "test" if part == len(parts) - 1 else "train"
            word = next(iter(options.values()))
            word = {True: "train", False: "test"}.get(word, word)
            labels = _labels(data)
            for index in range(len(data)):
                label = None if labels is None else labels[index]
                # Without a split of its own an item gets one by its content: some of the training part are for validation.
                kept = split if split == "test" else None
                yield Item(f"{word}/{index:07d}", str(len(data)), label, kept, place=f"{part}/{index}")

    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        for item in items:
            part, index = map(int, item.place.split("/"))
            try:
                yield _content(_opened(self.name, self.root, part), index, limit)
            except Unreadable as error:
                yield error

    def state(self) -> str:
        return digest(f"{part}\0{len(_opened(self.name, self.root, part))}" for part in range(len(_PARTS[self.name])))


@functools.cache
def _opened(name: str, root: str, part: int) -> Any:
    """A part of a data set, from its files or from the network."""
    import torchvision

    make, options = getattr(torchvision.datasets, name), _PARTS[name][part]
    try:
        return make(root, download=False, **options)
    except (RuntimeError, OSError):
        try:
            return make(root, download=True, **options)
        except Exception as error:  # urllib's, socket's, the checks of torchvision: whatever hinders it is the answer
            raise Unreadable("missing", f"{name} is not in {root} and cannot be downloaded: {error}") from error


def _labels(data: Any) -> list[str | None] | None:
    numbers = next((getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key)), None)
    if numbers is None:
        samples = getattr(data, "samples", getattr(data, "_samples", None))
        numbers = None if samples is None else [label for _, label in samples]
    if numbers is None:
        return None
    classes = getattr(data, "classes", None)
    return [
        None
        if int(number) < 0
        else str(classes[int(number)])
        if classes and int(number) < len(classes)
        else str(number)
        for number in numbers
    ]


def _content(data: Any, index: int, limit: int) -> bytes:
    files = next(
        (getattr(data, key) for key in ("_image_files", "_images", "samples", "_samples") if hasattr(data, key)), None
    )
    if files is not None:
        path = files[index][0] if isinstance(files[index], tuple) else files[index]
        return remote.read(str(path), limit=limit)
    picture = io.BytesIO()
    data[index][0].save(picture, format="PNG")
    return picture.getvalue()


def open_source(location: str) -> TorchVision:
    name, _, options = location.partition("#")
    wanted = dict(urllib.parse.parse_qsl(options))
    if name not in _PARTS:
        raise ParamsError(f"source.uri: there is no torchvision:{name}. There is: {', '.join(sorted(_PARTS))}.")
    if unknown := set(wanted) - {"root"}:
        raise ParamsError(f"source.uri: {', '.join(sorted(unknown))} behind # is unknown; there is: root")
    return TorchVision(name, str(Path(wanted.get("root", _ROOT)).expanduser()))
