"""A folder as people have them, through the real stage on a real Ray."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import ingest_config
from darkmatter import ingest, ledger, params, shards, sources

CONFIG = ingest_config()


def fill(root: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(40):
        image = Image.fromarray(random.integers(0, 255, (12 + number, 20, 3), dtype=np.uint8))
        kind = "cats" if number % 2 else "dogs"
        path = root / kind / f"deep{number % 3}" / f"{number}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (root / "cats" / "copy.png").write_bytes((root / "cats" / "deep1" / "1.png").read_bytes())
    (root / "dogs" / "named.jpg").write_bytes((root / "cats" / "deep1" / "7.png").read_bytes())
    (root / "cats" / "notes.txt").write_text("not an image")
    (root / "cats" / "sound.ogg").write_bytes(b"OggS" + bytes(40))
    (root / "dogs" / "empty.png").touch()
    (root / "dogs" / "cut.png").write_bytes((root / "cats" / "deep2" / "5.png").read_bytes()[:200])
    Image.new("RGB", (101, 100)).save(root / "dogs" / "large.png")
    (root / "dogs" / "heavy.png").write_bytes(bytes(2**20 + 1))
    (root / "dogs" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dogs" / "outside.png").symlink_to("/etc/passwd")
    (root / os.fsdecode(b"latin\xe9.txt")).write_text("x")


def run(root: Path, out: Path, *, labels: bool = True, **changes: Any) -> dict[str, Any]:
    section = sources.SourceConfig(uri=f"folder:{root}", labels=labels)
    return ingest.ingest(section, ingest_config(**changes), out=out)


def rows(out: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def labels_by_key(out: Path) -> dict[str, tuple[str, str | None]]:
    """Key -> (split, label), of every sample in the shards."""
    manifest = shards.Manifest.load(out)
    found = {}
    for shard in manifest.shards:
        for sample in shards.read_shard(out, shard):
            assert hashlib.sha256(sample.content).hexdigest()[:32] == sample.key
            label = None if sample.label is None else (manifest.classes or [])[sample.label]
            assert sample.key not in found
            found[sample.key] = (shard.split, label)
    return found


def key_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@pytest.fixture
def root(tmp_path: Path, ray_session: None) -> Path:
    fill(tmp_path / "photos")
    return tmp_path / "photos"


def test_every_file_is_a_sample_a_duplicate_or_a_reject_with_its_reason(root: Path, tmp_path: Path) -> None:
    counts = run(root, tmp_path / "out")
    assert counts["files_seen"] == 51 == counts["samples"] + counts["duplicates"] + counts["rejects"]
    assert counts["duplicates"] == 2
    rejects = rows(tmp_path / "out", "rejects")
    assert Counter(row["reason"] for row in rejects) == counts["rejects_by_reason"]
    assert {row["name"]: row["reason"] for row in rejects} == {
        "cats/notes.txt": "not-an-image",
        "cats/sound.ogg": "not-an-image",
        "dogs/cut.png": "damaged",
        "dogs/empty.png": "empty",
        "dogs/gone.png": "missing",
        "dogs/heavy.png": "too-large",
        "dogs/large.png": "too-many-pixels",
        "dogs/outside.png": "outside",
        os.fsdecode(b"latin\xe9.txt"): "not-an-image",
    }
    assert {row["name"]: row["same_as"] for row in rows(tmp_path / "out", "duplicates")} == {
        "cats/deep1/1.png": "cats/copy.png",
        "dogs/named.jpg": "cats/deep1/7.png",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_shards_hold_the_original_bytes_and_the_label_of_the_first_folder(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    manifest = shards.Manifest.load(tmp_path / "out")
    manifest.verify(tmp_path / "out")
    assert manifest.classes == ["cats", "dogs"]
    assert all(shard.samples <= CONFIG.samples_per_shard for shard in manifest.shards)
    assert {split for split, _ in labels_by_key(tmp_path / "out").values()} == {"train", "val", "test"}
    for path in sorted((root / "cats").rglob("deep*/*")) + sorted((root / "dogs").rglob("deep*/*")):
        assert labels_by_key(tmp_path / "out")[key_of(path)][1] == path.relative_to(root).parts[0]


def test_equal_sources_give_equal_bytes(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "a") == run(root, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_nothing_new_changes_no_byte_and_reads_no_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_counts = run(root, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(ingest, "_inspect", lambda *_: pytest.fail("a file was read"))
    monkeypatch.setattr(ingest, "_write", lambda *_: pytest.fail("a shard was written"))
    assert run(root, tmp_path / "out") == before_counts
    assert contents(tmp_path / "out") == before


def test_new_files_go_into_new_shards_and_the_old_ones_stay(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    before, samples = contents(tmp_path / "out"), labels_by_key(tmp_path / "out")
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    (root / "ants").mkdir()
    Image.new("RGB", (9, 9), "green").save(root / "ants" / "0-first.png")
    (root / "ants" / "copy.png").write_bytes((root / "dogs" / "deep1" / "4.png").read_bytes())
    (root / "ants" / "bad.png").write_text("bad")
    counts = run(root, tmp_path / "out")
    after, now = contents(tmp_path / "out"), labels_by_key(tmp_path / "out")
    assert counts["files_seen"] == 54 == counts["samples"] + counts["duplicates"] + counts["rejects"]
    assert {name: after[name] for name in before if name.endswith((".tar", ".npy"))}.items() <= before.items()
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}.items() >= inodes.items()
    assert len([name for name in after if name.endswith(".tar")]) == len(inodes) + 1
    assert samples.items() <= now.items()
    assert now.keys() - samples.keys() == {key_of(root / "ants" / "0-first.png")}
    assert shards.Manifest.load(tmp_path / "out").classes == ["cats", "dogs", "ants"]  # numbers of the others stay


def test_removed_files_are_listed_and_leave_when_asked(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    before = labels_by_key(tmp_path / "out")
    gone, copied = root / "cats" / "deep0" / "3.jpg", root / "cats" / "deep1" / "1.png"
    key = key_of(gone)
    gone.unlink()
    copied.unlink()  # another file has its content
    counts = run(root, tmp_path / "out")
    assert labels_by_key(tmp_path / "out") == before
    assert rows(tmp_path / "out", "removed") == [{"name": "cats/deep0/3.jpg"}]
    assert counts["from_removed_files"] == 1
    assert counts["files_seen"] + 1 == counts["samples"] + counts["duplicates"] + counts["rejects"] == 50
    assert run(root, tmp_path / "out") == counts  # and once more, from what was saved
    untouched = {
        shard.path for shard in shards.Manifest.load(tmp_path / "out").shards if key not in shard.keys(tmp_path / "out")
    }
    old = contents(tmp_path / "out")
    counts = run(root, tmp_path / "out", drop_removed=True)
    assert labels_by_key(tmp_path / "out") == {k: v for k, v in before.items() if k != key}
    assert {name: contents(tmp_path / "out")[name] for name in untouched} == {name: old[name] for name in untouched}
    assert rows(tmp_path / "out", "removed") == []
    assert counts["from_removed_files"] == 0


def test_a_file_that_changed_is_another_sample(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    path = root / "cats" / "deep0" / "3.jpg"
    old = key_of(path)
    Image.new("RGB", (8, 8), "purple").save(path)
    run(root, tmp_path / "out", drop_removed=True)
    assert labels_by_key(tmp_path / "out")[key_of(path)][1] == "cats"
    assert old not in labels_by_key(tmp_path / "out")


def test_a_file_that_got_another_label_moves_to_a_shard_with_it(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    path = root / "cats" / "deep0" / "3.jpg"
    key, split = key_of(path), labels_by_key(tmp_path / "out")[key_of(path)][0]
    path.rename(root / "dogs" / "3.jpg")
    run(root, tmp_path / "out")
    assert labels_by_key(tmp_path / "out")[key] == (split, "dogs")


def test_other_settings_make_it_anew(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, tmp_path / "out")
    counts = run(root, tmp_path / "out", max_pixels=20_000)
    assert "made by other code, settings or data" in capsys.readouterr().out
    assert "too-many-pixels" not in counts["rejects_by_reason"]
    run(root, tmp_path / "fresh", max_pixels=20_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_split_shares_are_as_asked() -> None:
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(20_000)]
    shares = Counter(ingest.split_of(digest, CONFIG) for digest in digests)
    for split, share in (("train", 0.55), ("val", 0.2), ("test", 0.25)):
        assert abs(shares[split] / len(digests) - share) < 0.015


def test_a_split_that_the_source_decides_stands(root: Path, tmp_path: Path) -> None:
    files = sorted((root / "dogs").rglob("deep*/*"))
    lines = [json.dumps({"path": str(path), "split": ("train", "val", "test")[n % 3]}) for n, path in enumerate(files)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    section = sources.SourceConfig(uri=f"manifest:{tmp_path}/list.jsonl", labels=False)
    ingest.ingest(section, CONFIG, out=tmp_path / "out")
    found = labels_by_key(tmp_path / "out")
    assert [found[key_of(path)][0] for path in files] == [("train", "val", "test")[n % 3] for n in range(len(files))]


def test_without_labels_none_is_kept(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out", labels=False)
    assert shards.Manifest.load(tmp_path / "out").classes is None
    assert {label for _, label in labels_by_key(tmp_path / "out").values()} == {None}


def test_images_that_look_alike_are_left_out_when_asked(tmp_path: Path, ray_session: None) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    from sklearn.datasets import load_sample_images

    for number, pixels in enumerate(load_sample_images().images):
        image = Image.fromarray(pixels).resize((160, 120))
        image.save(root / f"{number}-a.png")
        image.save(root / f"{number}-b.jpg", quality=60)
        image.resize((80, 60)).save(root / f"{number}-c.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / f"{number}-d.png")
    for number in range(3):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(
            root / f"flat-{number}.png"
        )  # show nothing: none is like another
    limits = {"max_pixels": 100_000}
    assert run(root, tmp_path / "all", **limits)["samples"] == 11
    counts = run(root, tmp_path / "some", near_duplicates=4, **limits)
    assert counts["files_seen"] == 11 == counts["samples"] + counts["near_duplicates"]
    assert {row["name"]: row["looks_like"] for row in rows(tmp_path / "some", "near_duplicates")} == {
        f"{number}-{letter}": f"{number}-a.png" for number in range(2) for letter in ("b.jpg", "c.png")
    }


def test_near_duplicates_are_found_at_exactly_the_asked_distance() -> None:
    random = np.random.default_rng(0)
    codes = [int(code) for code in random.integers(-(2**63), 2**63, 300)]
    rows = [(str(n), code, False) for n, code in enumerate(codes)]
    for number in range(100):
        flipped = codes[number] % 2**64
        for bit in random.permutation(64)[: number % 9].tolist():
            flipped ^= 1 << bit
        rows.append((f"near {number}", flipped - 2**64 * (flipped >= 2**63), False))
    for distance in (0, 3, 7):
        found = dict(ledger.near_duplicates(distance)(iter(rows)))
        assert found == {f"near {n}": str(n) for n in range(100) if n % 9 <= distance}
    assert not dict(ledger.near_duplicates(-1)(iter(rows)))
    assert not dict(ledger.near_duplicates(7)((key, code, True) for key, code, _ in rows))  # samples stay


def test_a_folder_without_images_is_refused_and_nothing_is_written(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no usable image among 1 files: \{'not-an-image': 1\}"):
        run(tmp_path / "texts", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


class Restless(sources.Source):
    """Its files change after they were looked at."""

    def __init__(self, root: Path, changing: set[str]) -> None:
        self.root, self.changing = root, changing

    def items(self) -> Any:
        return (sources.Item(path.name, "1") for path in self.root.iterdir())

    def read(self, items: Any, *, limit: int) -> Any:
        for item in items:
            mark = self.root.parent / f"read-{item.name}"
            if item.name in self.changing and mark.exists():
                yield b"something else"
                continue
            mark.touch()
            yield (self.root / item.name).read_bytes()


def test_a_file_that_changes_between_the_looks_makes_room_for_its_copy(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "files").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / "files" / name)
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this file
    source = Restless(tmp_path / "files", {"a.png", "c.png"})
    config = ingest_config(val_fraction=0.0, test_fraction=0.0)
    counts = ingest._Ingest(source, config, labels=False, made={}, out=tmp_path / "out").run()
    assert (counts["samples"], counts["duplicates"], counts["rejects_by_reason"]) == (1, 0, {"changed": 2})
    assert list(labels_by_key(tmp_path / "out")) == [key_of(tmp_path / "files" / "b.png")]


KILLED = """
import sys
from darkmatter import cluster, ingest, sources
import conftest
with cluster.session():
    section = sources.SourceConfig(uri=f"folder:{sys.argv[1]}", labels=True)
    from pathlib import Path
    ingest.ingest(section, conftest.ingest_config(), out=Path(sys.argv[2]))
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """The first ingest and one with new files, each killed many times; what no file of them is, is not there at the end."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(root, first, symlinks=True)
    random = np.random.default_rng(1)
    shutil.copytree(root, second, symlinks=True)
    for number in range(30):
        Image.fromarray(random.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(second / "cats" / f"new{number}.png")
    for path in first.rglob("*"):  # equal versions: what was known of the first stays known
        if path.is_file() and not path.is_symlink():
            stamp = path.stat().st_mtime_ns
            os.utime(second / path.relative_to(first), ns=(stamp, stamp))
    expected = tmp_path / "expected"
    run(first, expected)
    quiet = contents(expected)
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": address}
    kills, deadline = 0, time.monotonic() + 240
    delays = random.uniform(0.0, 1.6, 40).tolist()
    out = tmp_path / "work" / "out"
    while kills < 20:
        assert time.monotonic() < deadline
        if not kills or (out / "manifest.json").exists():
            shutil.rmtree(out.parent, ignore_errors=True)  # it came through: from the start
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLED, str(first), str(out)],
            env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (out.parent / ".out.ledger").exists():
            time.sleep(0.005)
        time.sleep(delays[kills])
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    run(first, out)
    assert contents(out) == quiet
    assert [path.name for path in out.parent.iterdir()] == ["out"]


FULL = """
import resource, sys
from pathlib import Path
from darkmatter import cluster, console, ingest, sources
from darkmatter.sources import folder
import conftest

class Full(folder.Folder):
    def read(self, items, *, limit):
        yield from super().read(items, limit=limit)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # from here on, in the worker

def main():
    section = sources.SourceConfig(uri=f"folder:{sys.argv[1]}", labels=True)
    made = ingest._made(section, conftest.ingest_config())
    with cluster.session():
        ingest._Ingest(Full(sys.argv[1]), conftest.ingest_config(), labels=True, made=made, out=Path(sys.argv[2])).run()

console.run(main)
"""


def test_a_full_disk_is_a_clear_error_and_leaves_what_there_was(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out")
    before, counts = contents(tmp_path / "out"), run(root, tmp_path / "out")
    for number in range(20):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(
            root / f"{number}.png"
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", FULL, str(root), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "darkmatter: the disk is full: " in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "out") == before
    assert run(root, tmp_path / "out")["samples"] == counts["samples"] + 20


def test_builtin_digits_are_the_real_ones() -> None:
    source = sources.open_source(sources.SourceConfig(uri="builtin:mnist", labels=True))
    items = list(source.items())
    assert Counter(item.label for item in items) == {str(digit): 500 for digit in range(10)}
    from darkmatter import images

    (content,) = source.read(items[:1], limit=10_000)
    assert images.decode(content).shape == (28, 28, 3)
    assert source.state() == source.state()


def test_source_of_another_scheme_is_refused() -> None:
    with pytest.raises(
        params.ParamsError, match="There is: builtin, folder, manifest, parquet, torchvision, webdataset"
    ):
        sources.open_source(sources.SourceConfig(uri="ftp:host", labels=False))
