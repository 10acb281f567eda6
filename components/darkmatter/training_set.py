"""Labelled shards of original bytes -> the training set: bounded images without labels, their statistics."""

import functools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import Field

from darkmatter import cluster, files, images, plugin, shards
from darkmatter.augmentations import Views, collate
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
    """Writes `out` (shards of the train and val splits without labels, manifest.json, images.json) whole or not at all.

    Returns:
        Counts and statistics.
    """
    original = shards.Manifest.load(shards_folder)
    sources = [shard for shard in original.shards if shard.split in _HELD_OUT]
    with files.whole_folder(out) as folder:
        tasks = [(shards_folder.resolve(), shard, config, folder.resolve()) for shard in sources]
        written = cluster.map_tasks(_convert, tasks, "preparing")
        manifest = shards.Manifest(classes=None, shards=[shard for shard, _ in written])
        manifest.save(folder)
        moments = sum(sums for shard, sums in written if shard.split == "train")
        spec = _image_spec(config, np.asarray(moments))
        files.write_json(folder / "images.json", spec.model_dump())
    return {
        "samples_by_split": manifest.samples_by_split(_HELD_OUT),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "mean": spec.mean,
        "std": spec.std,
    }


def load_image_spec(folder: Path) -> ImageSpec:
    return ImageSpec(**json.loads((folder / "images.json").read_text()))


def _convert(
    folder: Path, shard: shards.Shard, config: AugmentConfig, out: Path
) -> tuple[shards.Shard, Float[np.ndarray, "3 channels"]]:
    """One shard, and the sums of 1, x and x^2 over its pixels."""
    samples = []
    sums = np.zeros((3, config.channels))
    manifest = shards.Manifest(classes=None, shards=[shard])
    with shards.Reader(folder, manifest, shard.split) as reader:
        for index, key in enumerate(reader.keys):
            pixels = images.decode(reader.read(index))
            content = images.encode(
                pixels, max_side=config.max_side, channels=config.channels, encoding=config.encoding
            )
            samples.append(shards.Sample(key=key, content=content, extension=config.encoding.replace("jpeg", "jpg")))
            values = images.decode_own(content) / 255.0  # as training will see them
            sums += [np.full(config.channels, values[0].size), values.sum((1, 2)), np.square(values).sum((1, 2))]
    return shards.write_shard(out / shard.path, samples, split=shard.split, labels=False), sums


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


def choose_views(section: dict[str, Any], spec_size: int) -> Views:
    module, options = plugin.choose("augmentations", section, where="augment.views")
    return module.build(options, image_size=spec_size)


def look(
    folder: Path, views: Views, *, samples: int = 10, epochs: int = 4, seed: int = 0
) -> tuple[list[UInt8[np.ndarray, "channels height width"]], Float[np.ndarray, "samples views channels size size"]]:
    """Some training images, evenly spread, and their views in the first epochs, for a contact sheet."""
    manifest, spec = shards.Manifest.load(folder), load_image_spec(folder)
    with shards.Reader(folder, manifest, "train") as reader:
        chosen = np.linspace(0, len(reader) - 1, min(samples, len(reader))).astype(np.int64)
        contents = [reader.read(index) for index in chosen]
    batch = collate(contents, chosen, side=spec.max_side)
    drawn = [view.numpy() for epoch in range(epochs) for view in views(batch, seed=seed, epoch=epoch)]
    return [images.decode_own(content) for content in contents], np.stack(drawn, axis=1)


def batch_loader(spec: ImageSpec) -> Any:
    """What a stream over the training set calls to decode: contents, sample numbers -> ImageBatch."""
    return functools.partial(collate, side=spec.max_side)


def held_out(folder: Path, limit: int) -> list[bytes]:
    """At most `limit` samples of the validation split (of the training split where there is no other), shuffled: in a
    source sorted by class, neighbours would be alike and the energy margin too hard."""
    manifest = shards.Manifest.load(folder)
    split: shards.Split = "val" if manifest.samples("val") else "train"
    with shards.Reader(folder, manifest, split) as reader:
        return [reader.read(index) for index in permutation(0, 0, len(reader))[:limit].tolist()]
