import dataclasses
import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from darkmatter import shards

SAMPLES = [
    shards.Sample(key=f"{number:032x}", content=bytes([number]) * (700 * number + 1), extension="png", label=number % 3)
    for number in range(5)
]


def write(folder: Path, *, labels: bool = True, split: shards.Split = "train") -> shards.Manifest:
    samples = SAMPLES if labels else [dataclasses.replace(one, label=None) for one in SAMPLES]
    shard = shards.write_shard(folder / "train-000000.tar", samples, split=split)
    manifest = shards.Manifest(classes=["a", "b", "c"] if labels else None, shards=[shard])
    manifest.save(folder)
    return manifest


# WebDataset 1.0.2 leaves the tar open; that is its warning, not ours.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    write(tmp_path)
    read = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [one["__key__"] for one in read] == [one.key for one in SAMPLES]
    assert [one["png"] for one in read] == [one.content for one in SAMPLES]
    assert [int(one["cls"]) for one in read] == [one.label for one in SAMPLES]


def test_reader_finds_each_sample_by_one_offset(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    with shards.Reader(tmp_path, shards.Manifest.load(tmp_path), "train") as reader:
        assert [reader.read(index) for index in (3, 0, 4, 1, 2)] == [SAMPLES[i].content for i in (3, 0, 4, 1, 2)]
        assert reader.labels.tolist() == [one.label for one in SAMPLES]
        assert reader.keys == [one.key for one in SAMPLES]
    assert shards.Manifest.load(tmp_path) == manifest
    with shards.Reader(tmp_path, manifest, "test") as reader:
        assert len(reader) == 0


def test_few_files_are_open_however_many_shards_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And while there is room each is opened once."""
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 4)
    parts = [
        shards.write_shard(
            tmp_path / f"train-{n}.tar", [dataclasses.replace(SAMPLES[1], key=f"{n:032x}")], split="train"
        )
        for n in range(12)
    ]

    def opened() -> list[str]:
        links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return [link for link in links if link.startswith(str(tmp_path)) and link.endswith(".tar")]

    with shards.Reader(tmp_path, shards.Manifest(classes=None, shards=parts), "train") as reader:
        for index in (0, 1, 2, 0, 1, 2):
            assert reader.read(index) == SAMPLES[1].content
        assert len(opened()) == 3
        assert reader._opened.cache_info().misses == 3
        for index in range(12):
            reader.read(index)
            assert len(opened()) <= 4
    assert not opened()


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert write(tmp_path / "a").digest == write(tmp_path / "b").digest
    first, second = (tmp_path / name / "train-000000.tar" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o644)}


def test_without_labels_no_label_touches_the_disk(tmp_path: Path) -> None:
    write(tmp_path, labels=False)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert all(name.endswith(".png") for name in tar.getnames())
    with shards.Reader(tmp_path, shards.Manifest.load(tmp_path), "train") as reader:
        assert reader.labels.tolist() == [-1] * len(SAMPLES)


def test_the_digest_names_the_content_and_its_split(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    digest = write(tmp_path / "a").digest
    assert write(tmp_path / "b", split="val").digest != digest
    assert write(tmp_path / "c", labels=False).digest != digest


def test_one_flipped_bit_is_found_and_the_shard_named(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000000\.tar is damaged"):
        manifest.verify(tmp_path)


def test_a_damaged_index_is_found_and_named(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    path = tmp_path / "train-000000.index.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000000\.index\.npy is damaged"):
        manifest.verify(tmp_path)


def test_a_shard_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    assert list(shards.read_shard(tmp_path, manifest.shards[0])) == SAMPLES


def test_the_tar_is_that_of_pythons_own_writer(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for one in SAMPLES:
            for name, content in ((f"{one.key}.png", one.content), (f"{one.key}.cls", str(one.label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert (tmp_path / "theirs.tar").read_bytes() == (tmp_path / manifest.shards[0].path).read_bytes()


def test_a_shard_from_before_a_kill_counts_only_with_the_same_keys(tmp_path: Path) -> None:
    (shard,) = write(tmp_path).shards
    keys, path = [one.key for one in SAMPLES], tmp_path / shard.path
    assert shards.existing(path, "train", keys) == shard
    assert shards.existing(path, "train", keys[:-1]) is None
    assert shards.existing(tmp_path / "train-000001.tar", "train", keys) is None
    (tmp_path / shard.index_path).unlink()
    assert shards.existing(path, "train", keys) is None


def test_a_missing_or_short_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"train-000000\.tar is missing or not \d+ bytes long"):
        shards.Manifest.load(tmp_path)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two samples have the same key"):
        shards.write_shard(tmp_path / "a.tar", [SAMPLES[0], SAMPLES[0]], split="train")


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    text = (tmp_path / "manifest.json").read_text().replace('"format": 2', '"format": 3')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="format 3; this version reads 2"):
        shards.Manifest.load(tmp_path)
