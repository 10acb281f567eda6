"""A source -> labelled shards of pictures as they were encoded, less their metadata, with every file accounted for.

What is known of each file is kept, so that only new ones are looked at: each is read, checked and hashed in parallel
tasks. Then, in one place, duplicates are dropped and splits assigned; the outcome depends on the content and not on the
number of tasks. New samples go into new shards; the old ones keep their bytes.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import Field

from darkmatter import cluster, files, images, lineage, metadata, plugin, shards
from darkmatter.guard import Guard, Limits
from darkmatter.ledger import Ledger, key_of, near_duplicates
from darkmatter.params import Config
from darkmatter.sources import Item, Source, SourceConfig, Unreadable, open_source

_ITEMS_PER_TASK = 256
_LEDGER = "files.parquet"


class IngestConfig(Config):
    """The section `ingest` of params.yaml."""

    samples_per_shard: int = Field(gt=0)
    """At most so many samples in one tar."""
    val_fraction: float = Field(ge=0, lt=1)
    """Share of the samples for validation: the health of a run and all choices are made on it."""
    test_fraction: float = Field(ge=0, lt=1)
    """Share of the samples that only `evaluate` reads."""
    max_pixels: int = Field(gt=0, le=178_956_970)
    """Larger images are rejected before they are decoded (decompression bombs). Pillow decodes none over 179 million."""
    max_file_mebibytes: int = Field(gt=0)
    """Larger files are rejected before they are read."""
    max_decode_seconds: float = Field(gt=0)
    """An image that takes longer is rejected."""
    max_decode_mebibytes: int = Field(ge=512)
    """Memory of the process that decodes; an image that needs more is rejected."""
    near_duplicates: int = Field(ge=-1, le=7)
    """Leave out what looks like an earlier one: perceptual hashes differ in at most so many of 64 bits. -1: keep."""
    drop_removed: bool
    """Take samples out of the shards when the source has lost their files; else they are listed and stay."""

    @property
    def limits(self) -> Limits:
        return Limits(self.max_pixels, self.max_decode_seconds, self.max_decode_mebibytes)


def ingest(section: SourceConfig, config: IngestConfig, *, out: Path) -> dict[str, Any]:
    """Makes `out` (shards, manifest.json, and lists of all files) what the source is now, whole or not at all.

    What is there already stays, if it was made by the same code and settings from the same source. After a kill at any
    moment the next call goes on, to the same result.

    Returns:
        The counts: files_seen + from_removed_files == samples + duplicates + near_duplicates + rejects.

    Raises:
        ValueError: the source holds no usable image.
        Unreadable: the source cannot be listed.
    """
    return _Ingest(open_source(section), config, labels=section.labels, made=_made(section, config), out=out).run()


def _made(section: SourceConfig, config: IngestConfig) -> dict[str, Any]:
    """By what shards are made: with the same they can be kept. How many samples a shard has, does not matter to others."""
    scheme = section.uri.partition(":")[0]
    source = Path(plugin.load("sources", scheme, where="source.uri").__file__ or "")
    settings = config.model_dump(exclude={"samples_per_shard", "drop_removed"})
    return {"code": lineage.code_digest([Path(__file__), source]), "source": section.model_dump(), "ingest": settings}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A sample that is to be written."""

    item: Item
    sha256: str
    extension: str
    label: int | None


Failure = tuple[str, str, str]
"""Name of an item, reason, detail."""


class _Ingest:
    """One run. The new folder is filled beside the old one, whose shards are links in it, and takes its place at the end."""

    def __init__(
        self, source: Source, config: IngestConfig, *, labels: bool, made: Mapping[str, Any], out: Path
    ) -> None:
        self.source, self.config, self.labels, self.made, self.out = source, config, labels, made, out
        self.folder = out.with_name(f".{out.name}.new").resolve()
        self.classes: list[str] = []
        self.kept: dict[str, shards.Shard] = {}
        self.next: dict[str, int] = dict.fromkeys(get_args(shards.Split), 0)

    def run(self) -> dict[str, Any]:
        self.ledger = Ledger(self.out.with_name(f".{self.out.name}.ledger"), made=self.made)
        if self.ledger.is_new:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_over()
        seen = self.ledger.list(self.source.items(), labels=self.labels)
        self._inspect()
        while True:  # a file that changes while it is read makes room for another one with its content
            self.ledger.choose(
                functools.partial(split_of, config=self.config), near_duplicates(self.config.near_duplicates)
            )
            self.classes += sorted(set(self.ledger.labels()) - set(self.classes)) if self.labels else []
            self._let_go()
            if not self._write():
                break
        manifest = shards.Manifest(
            classes=self.classes if self.labels else None,
            shards=sorted(
                self.kept.values(), key=lambda shard: (get_args(shards.Split).index(shard.split), shard.path)
            ),
            made=self.made,
        )
        counts = self._counts(manifest, seen)
        if not counts["samples"]:
            self.ledger.remove()
            shutil.rmtree(self.folder)
            raise ValueError(f"there is no usable image among {seen} files: {counts['rejects_by_reason']}")
        self._finish(manifest)
        return counts

    def _take_over(self) -> None:
        """Shards of the last ingest become links in the new folder, without a byte copied."""
        if not (self.out / "manifest.json").is_file():
            return
        tree = json.loads((self.out / "manifest.json").read_text())
        if tree.get("made") != json.loads(json.dumps(self.made)):
            print(f"{self.out} was made by other code, settings or data; it is made anew", flush=True)
            return
        before = shards.Manifest.load(self.out)
        if self.ledger.is_new:
            self.ledger.load(self.out / _LEDGER)
        self.classes = list(before.classes or [])
        for shard in before.shards:
            for name in shard.files:
                if not (self.folder / name).exists():
                    os.link(self.out / name, self.folder / name)
            self._keep(shard)

    def _keep(self, shard: shards.Shard) -> None:
        self.kept[shard.path] = shard
        self.next[shard.split] = max(self.next[shard.split], int(shard.path[-10:-4]) + 1)
        index = shard.index(self.folder)
        labels = [None if label < 0 else self.classes[label] for label in index["label"].tolist()]
        self.ledger.have(shard.path, shard.split, [key.decode() for key in index["key"].tolist()], labels)

    def _inspect(self) -> None:
        """Reads, checks and hashes what is not known."""
        blocks = _blocks(self.ledger.unknown_items())
        tasks = ((self.source, block, self.config) for block in blocks)
        total = -(-self.ledger.unknown() // _ITEMS_PER_TASK)
        for found in cluster.map_tasks(_inspect, tasks, "checking", total=total):
            self.ledger.note(found)

    def _let_go(self) -> None:
        """Samples that must leave: their shards are written again without them."""
        for path, keys in self.ledger.leaving(removed=self.config.drop_removed).items():
            shard = self.kept.pop(path)
            self.ledger.left(shard.keys(self.folder))
            stay = [one for one in shards.read_shard(self.folder, shard) if one.key not in keys]
            if stay:
                self._keep(shards.write_shard(self._new_path(shard.split), stay, split=shard.split))

    def _write(self) -> list[Failure]:
        """New shards of what is in none; returns what could not be read this time."""
        splits: tuple[shards.Split, ...] = get_args(shards.Split)
        total = -(-self.ledger.count_missing() // self.config.samples_per_shard) + len(splits) - 1
        failures: list[Failure] = []
        written = cluster.map_tasks(_write, self._write_tasks(splits), "writing shards", total=total)
        for shard, failed in written:
            if shard is not None:
                self._keep(shard)
            failures += failed
        self.ledger.note((name, None, None, None, reason, detail) for name, reason, detail in failures)
        return failures

    def _write_tasks(self, splits: Sequence[shards.Split]) -> Iterator[tuple[Any, ...]]:
        places = {name: number for number, name in enumerate(self.classes)}
        limit = self.config.max_file_mebibytes << 20
        for split in splits:
            wanted = (
                _Wanted(item=item, sha256=sha256, extension=extension, label=None if label is None else places[label])
                for item, sha256, extension, label in self.ledger.missing(split)
            )
            for members in _blocks(wanted, self.config.samples_per_shard):
                yield self.source, members, split, self._new_path(split), limit

    def _new_path(self, split: shards.Split) -> Path:
        number = self.next[split]
        self.next[split] = number + 1
        return self.folder / f"{split}-{number:06d}.tar"

    def _finish(self, manifest: shards.Manifest) -> None:
        lists = {
            "rejects": self.ledger.rejects,
            "duplicates": self.ledger.duplicates,
            "near_duplicates": self.ledger.near_duplicates,
            "removed": self.ledger.removed,
        }
        for name, rows in lists.items():
            with (self.folder / f"{name}.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows())
        self.ledger.save(self.folder / _LEDGER)
        manifest.save(self.folder)
        ours = {"manifest.json", _LEDGER, *(f"{name}.jsonl" for name in lists)}
        ours |= {path for shard in manifest.shards for path in shard.files}
        for path in self.folder.iterdir():
            if path.name not in ours:
                path.unlink()
        files.replace_folder(self.folder, self.out)
        self.ledger.remove()

    def _counts(self, manifest: shards.Manifest, seen: int) -> dict[str, Any]:
        reasons = self.ledger.reasons()
        by_split = manifest.samples_by_split()
        return {
            "files_seen": seen,
            "samples": sum(by_split.values()),
            "duplicates": _length(self.ledger.duplicates()),
            "near_duplicates": _length(self.ledger.near_duplicates()),
            "rejects": sum(reasons.values()),
            "from_removed_files": _length(self.ledger.removed()),
            "rejects_by_reason": reasons,
            "samples_by_class": self._by_class(manifest),
            "samples_by_split": by_split,
            "classes": len(manifest.classes or []),
            "shards": len(manifest.shards),
            "bytes": sum(shard.bytes for shard in manifest.shards),
        }

    def _by_class(self, manifest: shards.Manifest) -> dict[str, int]:
        """Empty without labels."""
        counts = np.zeros(len(manifest.classes or []), np.int64)
        for shard in manifest.shards if manifest.classes else ():
            labels = shard.index(self.folder)["label"]
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        return dict(zip(manifest.classes or [], counts.tolist(), strict=True))


def split_of(sha256: str, config: IngestConfig) -> shards.Split:
    """The split of a sample depends on its content alone, so that adding data never moves a sample."""
    place = int(sha256[:16], 16) / 2**64
    if place < config.test_fraction:
        return "test"
    return "val" if place < config.test_fraction + config.val_fraction else "train"


@functools.cache
def _guard(limits: Limits) -> Guard:
    """One for each process that runs tasks."""
    return Guard(limits)


def _inspect(source: Source, block: Sequence[Item], config: IngestConfig) -> list[tuple[Any, ...]]:
    """What Ledger.note takes."""
    guard, found = _guard(config.limits), list[tuple[Any, ...]]()
    contents = source.read(block, limit=config.max_file_mebibytes << 20)
    for item, content in zip(block, contents, strict=True):
        try:
            if isinstance(content, Unreadable):
                raise content
            seen = guard.inspect(content)
        except (images.Rejected, Unreadable) as error:
            found.append((item.name, None, None, None, error.reason, error.detail))
        else:
            digest = hashlib.sha256(content).hexdigest()
            found.append((item.name, digest, seen.extension, seen.fingerprint, None, None))
    return found


def _write(
    source: Source, members: Sequence[_Wanted], split: shards.Split, path: Path, limit: int
) -> tuple[shards.Shard | None, list[Failure]]:
    """One shard, unless it is there already from before a kill, and the items that are no longer what they were."""
    before = shards.existing(path, split, [key_of(one.sha256) for one in members])
    if before is not None:
        return before, []
    samples: list[shards.Sample] = []
    failures: list[Failure] = []
    for one, content in zip(members, source.read([one.item for one in members], limit=limit), strict=True):
        if isinstance(content, Unreadable):
            failures.append((one.item.name, content.reason, content.detail))
        elif hashlib.sha256(content).hexdigest() != one.sha256:
            failures.append((one.item.name, "changed", "the file changed while it was ingested"))
        else:
            picture, extension = metadata.strip(content)
            key = key_of(one.sha256)
            samples.append(shards.Sample(key=key, content=picture, extension=extension, label=one.label))
    return shards.write_shard(path, samples, split=split) if samples else None, failures


def _blocks(items: Iterable[Any], size: int = _ITEMS_PER_TASK) -> Iterator[list[Any]]:
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


def _length(rows: Iterable[Any]) -> int:
    return sum(1 for _ in rows)
