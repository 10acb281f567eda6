"""Samples -> WebDataset tars of deterministic bytes, and the manifest that finds each sample in them.

The tars are plain USTAR (any WebDataset reader opens them); the manifest gives random access: one `pread` a sample.
"""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from darkmatter import files

Split = Literal["train", "val", "test"]
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar. Columns hold one value a sample, in the order of the tar."""

    path: str  # relative to the manifest
    split: Split
    bytes: int
    sha256: str
    keys: list[str]
    offsets: list[int]  # of the sample's data member, in bytes from the start of the tar
    sizes: list[int]  # of the sample's data member, in bytes
    labels: list[int | None] | None  # index into Manifest.classes; None where labels were not kept

    @property
    def samples(self) -> int:
        return len(self.keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The identity of a data set: what DVC, training and the registry refer to."""

    classes: list[str] | None
    shards: list[Shard]

    @property
    def digest(self) -> str:
        """sha256 over the contents (splits, shard bytes, class names), not over where they lie."""
        contents = [self.classes, [(shard.split, shard.sha256) for shard in self.shards]]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def samples(self, split: Split) -> int:
        return sum(shard.samples for shard in self.shards if shard.split == split)

    def samples_by_split(self, splits: Iterable[Split] = get_args(Split)) -> dict[str, int]:
        return {split: self.samples(split) for split in splits}

    def save(self, folder: Path) -> None:
        shards = [{**dataclasses.asdict(shard), "samples": shard.samples} for shard in self.shards]
        tree = {"format": _FORMAT, "digest": self.digest, "classes": self.classes, "shards": shards}
        files.write(folder / "manifest.json", json.dumps(tree) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises ValueError when the manifest has another format or the shards do not have the sizes it names."""
        tree = json.loads((folder / "manifest.json").read_text())
        if tree["format"] != _FORMAT:
            raise ValueError(f"{folder}/manifest.json has format {tree['format']}; this version reads {_FORMAT}")
        shards = [Shard(**{name: value for name, value in s.items() if name != "samples"}) for s in tree["shards"]]
        for shard in shards:
            if not (folder / shard.path).is_file() or (folder / shard.path).stat().st_size != shard.bytes:
                raise ValueError(f"{folder / shard.path} is missing or not {shard.bytes} bytes long; run ingest again")
        return cls(classes=tree["classes"], shards=shards)

    def verify(self, folder: Path) -> None:
        """Reads every byte. Raises ValueError naming the first shard that is not what was written."""
        for shard in self.shards:
            if files.sha256(folder / shard.path) != shard.sha256:
                raise ValueError(
                    f"{folder / shard.path} is damaged: its sha256 is not the manifest's; run ingest again"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    key: str
    content: bytes
    extension: str
    label: int | None = None


def write_shard(path: Path, samples: Iterable[Sample], *, split: Split, labels: bool) -> Shard:
    """Writes one tar, whole or not at all; equal samples give equal bytes on every machine.

    Args:
        path: of the tar; the shard's recorded path is its name.
        samples: keys must be unique.
        split: recorded, not interpreted.
        labels: write each sample's label as `KEY.cls` and record it. Without it no label touches the file.

    Raises:
        ValueError: a key appears twice (WebDataset readers would merge or refuse the two).
    """
    keys: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    kept: list[int | None] = []
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            offsets.append(file.tell() + tarfile.BLOCKSIZE)
            keys.append(sample.key)
            sizes.append(len(sample.content))
            _add(tar, f"{sample.key}.{sample.extension}", sample.content)
            if labels:
                kept.append(sample.label)
                if sample.label is not None:
                    _add(tar, f"{sample.key}.cls", str(sample.label).encode())
    if len(set(keys)) != len(keys):
        raise ValueError(f"{path.name}: two samples have the same key")
    content = file.getvalue()
    files.write(path, content)
    return Shard(
        path=path.name,
        split=split,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        keys=keys,
        offsets=offsets,
        sizes=sizes,
        labels=kept if labels else None,
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults (mtime 0, uid 0, mode 0644) are what makes the bytes deterministic
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


class Reader:
    """Random access to the samples of one split, in the manifest's order. Safe to use from several threads."""

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        shards = [shard for shard in manifest.shards if shard.split == split]
        self._files = [os.open(folder / shard.path, os.O_RDONLY) for shard in shards]
        self._places = [
            (number, offset, size)
            for number, shard in enumerate(shards)
            for offset, size in zip(shard.offsets, shard.sizes, strict=True)
        ]
        self.keys = [key for shard in shards for key in shard.keys]
        self.labels = [label for shard in shards for label in shard.labels or [None] * shard.samples]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> bytes:
        number, offset, size = self._places[index]
        return os.pread(self._files[number], size, offset)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
