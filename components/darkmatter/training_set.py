"""Labelled shards -> the training set: bounded images without labels, their statistics."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import Field

from darkmatter import cluster, files, images, lineage, plugin, shards
from darkmatter.augmentations import Views
from darkmatter.params import Config
from darkmatter.stream import permutation

_HELD_OUT: tuple[shards.Split, ...] = ("train", "val")  # the test split is no part of it: only evaluate reads that


class AugmentConfig(Config):
    """The section `augment` of params.yaml."""

    image_size: int = Field(gt=0)
    """Side of a view and of the network's input, in pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for colour."""
    max_side: int = Field(gt=0)
    """Training images are shrunk to this long side, so that decoding is cheap."""
    encoding: Literal["png", "jpeg"]
    """png is lossless, for small images; jpeg has quality 90."""
    views: dict[str, Any]
    """The view policy: `name`, and options under that name."""


class ImageSpec(Config):
    """What training and inference must know of the images. Stands in the training set and in every exported model."""

    image_size: int
    """As in `augment`."""
    channels: int
    """As in `augment`."""
    max_side: int
    """As in `augment`."""
    mean: list[float]
    """Of each channel over the training pixels, in [0, 1]."""
    std: list[float]
    """Likewise."""


def build(shards_folder: Path, config: AugmentConfig, out: Path) -> dict[str, Any]:
    """Makes `out` (shards of the train and val splits without labels, manifest.json, images.json) whole or not at all.

    A shard that is there already, made in the same way from the same bytes, stays.

    Returns:
        Counts and statistics.
    """
    original = shards.Manifest.load(shards_folder)
    sources = [shard for shard in original.shards if shard.split in _HELD_OUT]
    settings = config.model_dump(include={"channels", "max_side", "encoding"})
    made = {"code": lineage.code_digest([Path(__file__)]), "augment": settings}
    known = _known(out, made)
    with files.whole_folder(out) as folder:
        tasks = [
            (shards_folder.resolve(), shard, config, folder.resolve()) for shard in sources if shard.sha256 not in known
        ]
        written = {origin: part for origin, part in known.items() if origin in {shard.sha256 for shard in sources}}
        for part in written.values():
            for name in part.shard.files:
                os.link(out / name, folder / name)
        written |= {part.origin: part for part in cluster.map_tasks(_convert, tasks, "preparing", total=len(tasks))}
        parts = [written[shard.sha256] for shard in sources]
        manifest = shards.Manifest(classes=None, shards=[part.shard for part in parts], made=made)
        manifest.save(folder)
        files.write_json(folder / "parts.json", [{"origin": part.origin, "sums": part.sums} for part in parts])
        moments = np.sum([part.sums for part in parts if part.shard.split == "train"], axis=0)
        spec = _image_spec(config, moments)
        files.write_json(folder / "images.json", spec.model_dump())
    return {
        "samples_by_split": manifest.samples_by_split(_HELD_OUT),
        "new_shards": len(tasks),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "mean": spec.mean,
        "std": spec.std,
    }


@dataclasses.dataclass(frozen=True)
class _Part:
    """A shard of the training set."""

    shard: shards.Shard
    origin: str
    """sha256 of the shard that it was made of."""
    sums: list[list[float]]
    """Of 1, x and x^2 over its pixels, for each channel."""


def _known(out: Path, made: Mapping[str, Any]) -> dict[str, _Part]:
    """By origin, the parts that need not be made again."""
    if not (out / "parts.json").is_file() or json.loads((out / "manifest.json").read_text()).get("made") != made:
        return {}
    rows = json.loads((out / "parts.json").read_text())
    parts = [_Part(shard, **row) for shard, row in zip(shards.Manifest.load(out).shards, rows, strict=True)]
    return {part.origin: part for part in parts}


def load_image_spec(folder: Path) -> ImageSpec:
    return ImageSpec(**json.loads((folder / "images.json").read_text()))


def _convert(folder: Path, shard: shards.Shard, config: AugmentConfig, out: Path) -> _Part:
    samples = []
    sums = np.zeros((3, config.channels))
    for sample in shards.read_shard(folder, shard):
        pixels = images.decode(sample.content)
        content = images.encode(pixels, max_side=config.max_side, channels=config.channels, encoding=config.encoding)
        extension = config.encoding.replace("jpeg", "jpg")
        samples.append(shards.Sample(key=sample.key, content=content, extension=extension))
        values = images.decode_own(content) / 255.0  # as training will see them
        size = values.shape[0] * values.shape[1]
        sums += [np.full(config.channels, size), values.sum((0, 1)), np.square(values).sum((0, 1))]
    written = shards.write_shard(out / shard.path, samples, split=shard.split)
    return _Part(written, shard.sha256, sums.tolist())


def _image_spec(config: AugmentConfig, sums: Float[np.ndarray, "3 channels"]) -> ImageSpec:
    count, total, squares = sums
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))  # an all-black data set must not divide by zero
    return ImageSpec(
        image_size=config.image_size,
        channels=config.channels,
        max_side=config.max_side,
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value), 6) for value in std],
    )


def choose_views(section: dict[str, Any], spec: ImageSpec | AugmentConfig) -> Views:
    module, options = plugin.choose("augmentations", section, where="augment.views")
    return module.build(options, image_size=spec.image_size, max_side=spec.max_side)


def look(
    folder: Path, views: Views, *, samples: int = 10, epochs: int = 4, seed: int = 0
) -> tuple[list[UInt8[np.ndarray, "height width channels"]], Float[np.ndarray, "samples views channels size size"]]:
    """Some training images, evenly spread, and their views in the first epochs, for a contact sheet."""
    manifest = shards.Manifest.load(folder)
    with shards.Reader(folder, manifest, "train") as reader:
        chosen = np.linspace(0, len(reader) - 1, min(samples, len(reader))).astype(np.int64)
        contents = [reader.read(index) for index in chosen]
    drawn = [view.numpy() for epoch in range(epochs) for view in views(contents, chosen, seed=seed, epoch=epoch)]
    return [images.decode_own(content) for content in contents], np.stack(drawn, axis=1)


def held_out(folder: Path, limit: int) -> list[bytes]:
    """At most `limit` samples of the split for it, shuffled."""
    manifest = shards.Manifest.load(folder)
    with shards.Reader(folder, manifest, held_out_split(manifest)) as reader:
        return shuffled(reader, limit)


def held_out_split(manifest: shards.Manifest) -> shards.Split:
    """The validation split, or the training split where there is no other."""
    return "val" if manifest.samples("val") else "train"


def shuffled(reader: shards.Reader, limit: int) -> list[bytes]:
    """At most `limit` samples, in no order: in a source sorted by class neighbours would be alike, and the energy margin
    too hard."""
    return [reader.read(index) for index in permutation(0, 0, len(reader))[:limit].tolist()]
