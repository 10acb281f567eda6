import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import augment_config
from darkmatter import images, shards, training_set


def test_no_label_and_no_test_sample_is_in_the_training_set(digits: Path) -> None:
    original = shards.Manifest.load(digits / "shards")
    manifest = shards.Manifest.load(digits / "train")
    assert original.classes == [str(digit) for digit in range(10)]
    assert manifest.classes is None
    held_back = {key for shard in original.shards if shard.split == "test" for key in shard.keys(digits / "shards")}
    assert held_back
    for shard in manifest.shards:
        assert shard.split in ("train", "val")
        assert (shard.index(digits / "train")["label"] == -1).all()
        assert not held_back & set(shard.keys(digits / "train"))
        with tarfile.open(digits / "train" / shard.path) as tar:
            assert all(name.endswith(".png") for name in tar.getnames())
    assert json.loads((digits / "train" / "manifest.json").read_text())["classes"] is None


def test_nothing_before_evaluation_reads_the_test_split(digits: Path, tmp_path: Path) -> None:
    """With rubbish in its place the training set is the same, and pretraining has nothing but that."""
    shutil.copytree(digits / "shards", tmp_path / "shards")
    for shard in shards.Manifest.load(digits / "shards").shards:
        if shard.split == "test":
            for name in shard.files:
                path = tmp_path / "shards" / name
                path.write_bytes(b"x" * path.stat().st_size)
    training_set.build(tmp_path / "shards", augment_config(), tmp_path / "train")
    for path in (digits / "train").iterdir():
        assert (tmp_path / "train" / path.name).read_bytes() == path.read_bytes()
    stages = yaml.safe_load((Path(__file__).parents[1] / "dvc.yaml").read_text())["stages"]
    assert {name for name, stage in stages.items() if "data/shards" in stage["deps"]} == {"augment", "evaluate"}


def test_training_images_are_the_originals_bounded(digits: Path) -> None:
    original, manifest = (shards.Manifest.load(digits / name) for name in ("shards", "train"))
    with (
        shards.Reader(digits / "shards", original, "train") as source,
        shards.Reader(digits / "train", manifest, "train") as reader,
    ):
        assert reader.keys == source.keys
        for index in range(0, len(reader), 25):
            decoded = images.decode(source.read(index))
            assert (images.decode_own(reader.read(index))[:, :, 0] == decoded[:, :, 0]).all()


def test_statistics_are_those_of_the_training_pixels(digits: Path) -> None:
    spec = training_set.load_image_spec(digits / "train")
    with shards.Reader(digits / "train", shards.Manifest.load(digits / "train"), "train") as reader:
        pixels = np.concatenate([images.decode_own(reader.read(i)).ravel() for i in range(len(reader))]) / 255
    assert spec.mean == pytest.approx([pixels.mean()], abs=1e-6)
    assert spec.std == pytest.approx([pixels.std()], abs=1e-6)
    assert (spec.image_size, spec.channels, spec.max_side) == (28, 1, 28)


def test_building_again_gives_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    training_set.build(digits / "shards", augment_config(), tmp_path / "again")
    for path in sorted((digits / "train").iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_shard_that_is_there_is_not_made_again(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(digits / "shards", tmp_path / "shards")
    manifest = shards.Manifest.load(tmp_path / "shards")
    some = dataclasses.replace(manifest, shards=manifest.shards[:1] + manifest.shards[2:])
    some.save(tmp_path / "shards")
    training_set.build(tmp_path / "shards", augment_config(), tmp_path / "train")
    before = {path.name: path.read_bytes() for path in (tmp_path / "train").glob("*.tar")}
    manifest.save(tmp_path / "shards")
    counts = training_set.build(tmp_path / "shards", augment_config(), tmp_path / "train")
    assert counts["new_shards"] == 1
    for path in sorted((digits / "train").iterdir()):
        assert (tmp_path / "train" / path.name).read_bytes() == path.read_bytes()
    assert before.items() <= {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}.items()
    again = training_set.build(tmp_path / "shards", augment_config(max_side=20), tmp_path / "train")
    assert again["new_shards"] == len(before) + 1


def test_colour_jpeg_of_another_size(digits: Path, tmp_path: Path) -> None:
    config = augment_config(channels=3, max_side=14, encoding="jpeg")
    counts = training_set.build(digits / "shards", config, tmp_path / "small")
    spec = training_set.load_image_spec(tmp_path / "small")
    assert len(spec.mean) == len(spec.std) == 3
    with shards.Reader(tmp_path / "small", shards.Manifest.load(tmp_path / "small"), "train") as reader:
        assert images.decode_own(reader.read(0)).shape == (14, 14, 3)
        assert len(reader) == counts["samples_by_split"]["train"]


def test_held_out_samples_are_of_the_validation_split_and_mixed(digits: Path) -> None:
    manifest = shards.Manifest.load(digits / "train")
    with shards.Reader(digits / "train", manifest, "val") as reader:
        everything = [reader.read(index) for index in range(len(reader))]
    chosen = training_set.held_out(digits / "train", 32)
    assert len(chosen) == 32
    assert set(chosen) <= set(everything)
    assert chosen != everything[:32]
    assert chosen == training_set.held_out(digits / "train", 32)
