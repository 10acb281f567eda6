"""A source -> labelled shards of original bytes, with every file accounted for.

Two passes over the source, each in parallel Ray tasks: the first reads, checks and hashes every file, the second writes
shards. Between them, in one place, duplicates are dropped and splits assigned, so that the outcome depends on the
content alone and not on the number of tasks.
"""

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from darkmatter import cluster, files, images, shards
from darkmatter.params import Config
from darkmatter.sources import Item, Source

_ITEMS_PER_TASK = 256


class IngestConfig(Config):
    """The section `ingest` of params.yaml."""

    samples_per_shard: int = Field(gt=0)
    """At most so many samples in one tar."""
    val_fraction: float = Field(ge=0, lt=1)
    """Share of the samples for validation: the health of a run and all choices are made on it."""
    test_fraction: float = Field(ge=0, lt=1)
    """Share of the samples that only `evaluate` reads."""
    max_pixels: int = Field(gt=0)
    """Larger images are rejected before they are decoded (decompression bombs)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the first pass found out about an item: either its digest or why it was rejected."""

    item: Item
    sha256: str = ""
    extension: str = ""
    reason: str = ""
    detail: str = ""


def ingest(source: Source, config: IngestConfig, *, labels: bool, out: Path) -> dict[str, Any]:
    """Writes `out` (shards, manifest.json, rejects.jsonl, duplicates.jsonl) whole or not at all.

    Returns:
        The counts: files_seen == samples + duplicates + rejects.

    Raises:
        ValueError: the source holds no usable image.
    """
    items = source.items()
    seen = _flatten(cluster.map_tasks(_inspect, [(source, block, config) for block in _blocks(items)], "checking"))
    originals, duplicates, rejects = _account(seen)

    classes = sorted({one.item.label for one in originals if one.item.label is not None}) if labels else None
    with files.whole_folder(out) as folder:
        tasks = _plan(source, originals, config, classes, folder.resolve())
        written = cluster.map_tasks(_write, tasks, "writing shards")
        kept = [shard for shard, _ in written if shard.samples]
        rejects += _flatten(changed for _, changed in written)
        manifest = shards.Manifest(classes=classes, shards=kept)
        counts = _counts(manifest, len(items), duplicates, rejects)
        if not counts["samples"]:
            raise ValueError(f"there is no usable image among {len(items)} files: {counts['rejects_by_reason']}")
        manifest.save(folder)
        _write_lines(folder / "rejects.jsonl", [_row(one, reason=one.reason, detail=one.detail) for one in rejects])
        _write_lines(folder / "duplicates.jsonl", [_row(one, same_as=first.item.name) for one, first in duplicates])
    return counts


def _inspect(source: Source, block: Sequence[Item], config: IngestConfig) -> list[_Seen]:
    return [_inspect_one(source, item, config.max_pixels) for item in block]


def _inspect_one(source: Source, item: Item, max_pixels: int) -> _Seen:
    try:
        content = source.read(item)
        images.decode(content, max_pixels=max_pixels)
    except images.Rejected as rejected:
        return _Seen(item=item, reason=rejected.reason, detail=rejected.detail)
    except OSError as error:
        return _Seen(item=item, reason="unreadable", detail=str(error))
    with Image.open(io.BytesIO(content)) as image:
        extension = str(image.format).lower().replace("jpeg", "jpg")
    return _Seen(item=item, sha256=hashlib.sha256(content).hexdigest(), extension=extension)


def _account(seen: Sequence[_Seen]) -> tuple[list[_Seen], list[tuple[_Seen, _Seen]], list[_Seen]]:
    """Originals, (duplicate, the original it repeats), rejects. The first in the source's order is the original."""
    first: dict[str, _Seen] = {}
    duplicates: list[tuple[_Seen, _Seen]] = []
    for one in seen:
        if not one.reason and first.setdefault(one.sha256, one) is not one:
            duplicates.append((one, first[one.sha256]))
    return list(first.values()), duplicates, [one for one in seen if one.reason]


def split_of(sha256: str, config: IngestConfig) -> shards.Split:
    """The split of a sample depends on its content alone, so that adding data never moves a sample."""
    place = int(sha256[:16], 16) / 2**64
    if place < config.test_fraction:
        return "test"
    return "val" if place < config.test_fraction + config.val_fraction else "train"


def _plan(
    source: Source, originals: Sequence[_Seen], config: IngestConfig, classes: list[str] | None, folder: Path
) -> list[tuple[Any, ...]]:
    tasks: list[tuple[Any, ...]] = []
    splits: tuple[shards.Split, ...] = ("train", "val", "test")
    for split in splits:
        members = [one for one in originals if split_of(one.sha256, config) == split]
        for number, start in enumerate(range(0, len(members), config.samples_per_shard)):
            path = folder / f"{split}-{number:06d}.tar"
            tasks.append((source, members[start : start + config.samples_per_shard], split, classes, path))
    return tasks


def _write(
    source: Source, members: Sequence[_Seen], split: shards.Split, classes: list[str] | None, path: Path
) -> tuple[shards.Shard, list[_Seen]]:
    samples: list[shards.Sample] = []
    changed: list[_Seen] = []
    for one in members:
        try:
            content = source.read(one.item)
        except OSError as error:
            changed.append(_Seen(item=one.item, reason="unreadable", detail=str(error)))
            continue
        if hashlib.sha256(content).hexdigest() != one.sha256:
            changed.append(_Seen(item=one.item, reason="changed", detail="the file changed while it was ingested"))
            continue
        label = classes.index(one.item.label) if classes and one.item.label is not None else None
        samples.append(shards.Sample(key=one.sha256[:32], content=content, extension=one.extension, label=label))
    return shards.write_shard(path, samples, split=split, labels=classes is not None), changed


def _counts(
    manifest: shards.Manifest, seen: int, duplicates: Sequence[Any], rejects: Sequence[_Seen]
) -> dict[str, Any]:
    by_split = manifest.samples_by_split()
    return {
        "files_seen": seen,
        "samples": sum(by_split.values()),
        "duplicates": len(duplicates),
        "rejects": len(rejects),
        "rejects_by_reason": dict(sorted(Counter(one.reason for one in rejects).items())),
        "samples_by_split": by_split,
        "classes": len(manifest.classes or []),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }


def _blocks(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + _ITEMS_PER_TASK] for start in range(0, len(items), _ITEMS_PER_TASK)]


def _flatten(lists: Any) -> list[Any]:
    return [one for some in lists for one in some]


def _row(one: _Seen, **rest: str) -> dict[str, str]:
    return {"name": one.item.name, **rest}


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))
