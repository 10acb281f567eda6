"""A folder as people have them, through the real stage on a real Ray."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darkmatter import ingest, params, shards, sources
from darkmatter.sources import folder

CONFIG = ingest.IngestConfig(samples_per_shard=10, val_fraction=0.2, test_fraction=0.3, max_pixels=10_000)


def fill(root: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(40):
        image = Image.fromarray(random.integers(0, 255, (12 + number, 20, 3), dtype=np.uint8))
        path = (
            root
            / ("cats" if number % 2 else "dogs")
            / f"deep{number % 3}"
            / f"{number}.{'png' if number % 3 else 'jpg'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (root / "cats" / "copy.png").write_bytes((root / "cats" / "deep1" / "1.png").read_bytes())
    (root / "dogs" / "named.jpg").write_bytes((root / "cats" / "deep1" / "7.png").read_bytes())
    (root / "cats" / "notes.txt").write_text("not an image")
    (root / "cats" / "sound.ogg").write_bytes(b"OggS" + bytes(40))
    (root / "dogs" / "empty.png").touch()
    (root / "dogs" / "cut.png").write_bytes((root / "cats" / "deep2" / "5.png").read_bytes()[:200])
    Image.new("RGB", (101, 100)).save(root / "dogs" / "large.png")
    (root / "dogs" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dogs" / "outside.png").symlink_to("/etc/passwd")
    (root / os.fsdecode(b"latin\xe9.txt")).write_text("x")


def run(root: Path, out: Path, config: ingest.IngestConfig = CONFIG, *, labels: bool = True) -> dict:
    return ingest.ingest(folder.open_source(str(root)), config, labels=labels, out=out)


@pytest.fixture
def root(tmp_path: Path, ray_session: None) -> Path:
    fill(tmp_path / "photos")
    return tmp_path / "photos"


def test_every_file_is_a_sample_a_duplicate_or_a_reject_with_its_reason(root: Path, tmp_path: Path) -> None:
    counts = run(root, tmp_path / "out")
    assert counts["files_seen"] == 50 == counts["samples"] + counts["duplicates"] + counts["rejects"]
    assert counts["duplicates"] == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in rows) == counts["rejects_by_reason"]
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons == {
        "cats/notes.txt": "not-an-image",
        "cats/sound.ogg": "not-an-image",
        "dogs/cut.png": "damaged",
        "dogs/empty.png": "empty",
        "dogs/gone.png": "unreadable",
        "dogs/large.png": "too-many-pixels",
        "dogs/outside.png": "unreadable",
        os.fsdecode(b"latin\xe9.txt"): "not-an-image",
    }
    same = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert {row["name"]: row["same_as"] for row in same} == {
        "cats/deep1/1.png": "cats/copy.png",
        "dogs/named.jpg": "cats/deep1/7.png",
    }


def test_shards_hold_the_original_bytes_and_the_label_of_the_first_folder(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    manifest = shards.Manifest.load(tmp_path / "out")
    manifest.verify(tmp_path / "out")
    assert manifest.classes == ["cats", "dogs"]
    assert all(shard.samples <= CONFIG.samples_per_shard for shard in manifest.shards)
    originals = {hashlib.sha256(p.read_bytes()).hexdigest()[:32]: p for p in root.rglob("*") if p.is_file()}
    for split in ("train", "val", "test"):
        with shards.Reader(tmp_path / "out", manifest, split) as reader:
            assert len(reader) > 0
            for index, (key, label) in enumerate(zip(reader.keys, reader.labels, strict=True)):
                content = reader.read(index)
                assert hashlib.sha256(content).hexdigest()[:32] == key
                names = {path.relative_to(root).parts[0] for path in [originals[key]]}
                assert manifest.classes[label] in names | {"cats", "dogs"}


def test_running_again_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "a") == run(root, tmp_path / "b")
    first, second = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_adding_files_moves_no_sample_to_another_split(root: Path, tmp_path: Path) -> None:
    def splits(out: Path) -> dict[str, str]:
        return {key: shard.split for shard in shards.Manifest.load(out).shards for key in shard.keys}

    run(root, tmp_path / "a")
    Image.new("RGB", (9, 9), "green").save(root / "cats" / "0-first.png")
    run(root, tmp_path / "b")
    before, after = splits(tmp_path / "a"), splits(tmp_path / "b")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_split_shares_are_as_asked() -> None:
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(20_000)]
    shares = Counter(ingest.split_of(digest, CONFIG) for digest in digests)
    for split, share in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
        assert abs(shares[split] / len(digests) - share) < 0.015


def test_without_labels_none_is_kept(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out", labels=False)
    manifest = shards.Manifest.load(tmp_path / "out")
    assert manifest.classes is None
    assert all(shard.labels is None for shard in manifest.shards)


def test_a_folder_without_images_is_refused_and_nothing_is_written(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no usable image among 1 files: \{'not-an-image': 1\}"):
        run(tmp_path / "texts", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_a_file_that_changes_between_the_passes_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    source, item = folder.open_source(str(tmp_path)), sources.Item("a.png")
    seen = ingest._inspect_one(source, item, 100)
    Image.new("RGB", (4, 4), "blue").save(path)
    shard, changed = ingest._write(source, [seen], "train", None, tmp_path / "out.tar")
    assert shard.samples == 0
    assert [one.reason for one in changed] == ["changed"]


def test_state_of_a_folder_changes_with_names_sizes_and_times(tmp_path: Path) -> None:
    source = folder.open_source(str(tmp_path))
    states = [source.state()]
    (tmp_path / "a").write_text("1")
    states.append(source.state())
    (tmp_path / "a").write_text("12")
    states.append(source.state())
    os.utime(tmp_path / "a", (1, 1))
    states.append(source.state())
    (tmp_path / "a").rename(tmp_path / "b")
    states.append(source.state())
    assert len(set(states)) == len(states)
    assert source.state() == states[-1]


def test_builtin_digits_are_the_real_ones() -> None:
    source = sources.open_source(sources.SourceConfig(uri="builtin:mnist", labels=True))
    items = source.items()
    assert Counter(item.label for item in items) == {str(digit): 500 for digit in range(10)}
    from darkmatter import images

    assert images.decode(source.read(items[0])).shape == (28, 28, 3)
    assert source.state() == source.state()


def test_source_of_another_scheme_is_refused() -> None:
    with pytest.raises(params.ParamsError, match="There is: builtin, folder"):
        sources.open_source(sources.SourceConfig(uri="ftp:host", labels=False))
