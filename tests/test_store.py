"""Streaming from S3: a real server on loopback, a line to it that can be cut, and a cache with a budget."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import s3
from darkmatter import files, remote, shards
from darkmatter.remote import Unreadable
from darkmatter.store import Store
from darkmatter.stream import Order, Stream

SHARDS, EACH = 12, 20


@dataclasses.dataclass
class Place:
    """A server with a bucket, a line to it, data on this machine, and stores that are opened anew for each process."""

    root: Path
    line: s3.Line
    data: Path
    manifest: shards.Manifest
    cache: Path

    def store(self, *, shards_in_cache: float = 1000, cache: str = "cache") -> Store:
        size = max(shard.bytes for shard in self.manifest.shards)
        return Store("s3://bucket/data", cache=self.cache / cache, budget=int(shards_in_cache * size))

    def object(self, number: int) -> Path:
        return self.root / "bucket" / "data" / f"{self.manifest.shards[number].sha256}.tar"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with s3.server(root) as found:
        yield root, found


@pytest.fixture
def place(port: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    root, number = port
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    line = s3.Line(number)
    s3.use(monkeypatch, line.port)
    data = tmp_path / "train"
    data.mkdir()
    made = Place(root, line, data, grown(data, SHARDS), tmp_path)
    made.store().publish(data, made.manifest)
    yield made
    line.close()
    for path in (root / "bucket" / "data").iterdir():
        path.unlink()


def grown(folder: Path, count: int) -> shards.Manifest:
    """So many shards of random bytes; the same ones each time."""
    parts = []
    for number in range(count):
        random = np.random.default_rng(number)
        samples = [
            shards.Sample(key=f"{number * EACH + one:032x}", content=random.bytes(1500), extension="png")
            for one in range(EACH)
        ]
        parts.append(shards.write_shard(folder / f"train-{number:06d}.tar", samples, split="train"))
    manifest = shards.Manifest(classes=None, shards=parts)
    manifest.save(folder)
    return manifest


def local(place: Place) -> list[bytes]:
    with shards.Reader(place.data, place.manifest, "train") as reader:
        return [reader.read(index) for index in range(len(reader))]


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def stream(reader: shards.Reader, *, window: int, **options: int) -> Stream:
    def load(contents: list[bytes], samples: np.ndarray, *, epoch: int) -> list[tuple[int, bytes]]:
        return list(zip(samples.tolist(), contents, strict=True))

    return Stream(reader, load, batch_size=8, seed=0, window=window, **options)


@pytest.mark.parametrize("window", [0, 3])
def test_what_is_streamed_is_what_lies_in_the_folder(place: Place, window: int) -> None:
    store, expected = place.store(), local(place)
    manifest = store.manifest(place.manifest.digest)
    assert manifest == place.manifest
    with store.reader(manifest, "train", window=window) as reader:
        assert reader.keys == [key for shard in manifest.shards for key in shard.keys(place.data)]
        for batch in stream(reader, window=window, threads=2).batches(0, 40):
            assert all(content == expected[sample] for sample, content in batch.loaded)


def test_a_second_time_only_what_is_new_is_sent(place: Place) -> None:
    store = place.store()
    assert store.publish(place.data, place.manifest) == 0
    before = {path: path.stat().st_mtime_ns for path in (place.root / "bucket" / "data").iterdir()}
    larger = grown(place.data, SHARDS + 1)
    new = [place.data / name for name in larger.shards[-1].files]
    assert store.publish(place.data, larger) == sum(path.stat().st_size for path in new)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert store.manifest(place.manifest.digest) == place.manifest  # the older data set is still there
    assert store.manifest(larger.digest) == larger


def test_the_cache_never_exceeds_its_budget_and_nothing_is_read_wrong(place: Place) -> None:
    window, room = 2, 4.5
    store, expected = place.store(shards_in_cache=room), local(place)
    budget = store._budget
    seen: list[int] = []
    with store.reader(place.manifest, "train", window=window) as reader:
        for batch in stream(reader, window=window).batches(0, 60):
            seen += [sample for sample, _ in batch.loaded]
            assert all(content == expected[sample] for sample, content in batch.loaded)
            assert sum(path.stat().st_size for path in place.cache.glob("cache/*") if path.is_file()) <= budget
    assert len(set(seen[: SHARDS * EACH])) == SHARDS * EACH
    assert 0 < len(tars(place.cache / "cache")) <= room


def test_what_was_used_last_leaves_the_cache_last(place: Place) -> None:
    store, parts = place.store(shards_in_cache=3), place.manifest.shards
    for number in (0, 1, 2, 0, 3):
        store.find(parts[number].path, parts[number].sha256)
        time.sleep(0.01)  # the clock of the file system
    assert {path.stem for path in tars(place.cache / "cache")} == {parts[number].sha256 for number in (0, 2, 3)}


def test_what_comes_next_is_fetched_before_it_is_asked_for(place: Place) -> None:
    store, order = place.store(), Order(0, [EACH] * SHARDS, 3)
    with store.reader(place.manifest, "train", window=3) as reader:
        assert not tars(place.cache / "cache")
        reader.expect(order.shards(0, 0))
        for coming in list(reader._coming.values()):
            coming.result()
        assert {path.stem for path in tars(place.cache / "cache")} == {
            place.manifest.shards[number].sha256 for number in order.shards(0, 0)
        }
        place.line.faults += ["refuse"] * 1000  # from here on nothing comes over the line
        for index in order.samples(0, 0, 3 * EACH).tolist():
            reader.read(index)


def test_a_cache_that_cannot_hold_two_windows_is_refused_with_what_to_do(place: Place) -> None:
    with pytest.raises(
        ValueError, match=r"two windows of 3 shards.*raise place.cache_gibibytes, or set .* to 2 at most"
    ):
        place.store(shards_in_cache=4.5).reader(place.manifest, "train", window=3)
    with pytest.raises(ValueError, match="all shards"):
        place.store(shards_in_cache=SHARDS - 1).reader(place.manifest, "train", window=0)
    with pytest.raises(ValueError, match="does not fit the cache"):
        place.store(shards_in_cache=0.5).find(*next(iter(place.manifest.shards[0].files.items())))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_shard_that_is_damaged_on_the_way_is_fetched_again(place: Place) -> None:
    store, shard = place.store(), place.manifest.shards[0]
    place.line.faults.append("flip")
    assert files.sha256(store.find(shard.path, shard.sha256)) == shard.sha256
    assert place.line.flipped == 1


def test_a_shard_that_is_damaged_there_is_refused_by_name(place: Place) -> None:
    store, shard = place.store(), place.manifest.shards[3]
    flip(place.object(3))
    with pytest.raises(Unreadable, match=r"train-000003.tar\): its sha256 is .* twice in a row") as caught:
        store.find(shard.path, shard.sha256)
    assert caught.value.reason == "damaged"
    assert not tars(place.cache / "cache")
    with (
        store.reader(place.manifest, "train", window=0) as reader,
        pytest.raises(Unreadable, match=r"train-000003\.tar"),
    ):
        list(stream(reader, window=0).batches(0, 30))


def test_a_shard_that_is_damaged_in_the_cache_is_fetched_again(place: Place) -> None:
    shard = place.manifest.shards[0]
    path = place.store().find(shard.path, shard.sha256)
    flip(path)
    assert files.sha256(place.store().find(shard.path, shard.sha256)) == shard.sha256


def test_a_missing_shard_is_named(place: Place) -> None:
    place.object(5).unlink()
    with pytest.raises(Unreadable, match="missing"):
        place.store().find("train-000005.tar", place.manifest.shards[5].sha256)


def test_a_line_that_drops_now_and_then_costs_nothing_but_time(place: Place) -> None:
    store, expected = place.store(), local(place)
    with store.reader(place.manifest, "train", window=2) as reader:
        for batch in stream(reader, window=2).batches(0, 30):
            if batch.step % 7 == 0:
                place.line.faults.append("cut" if batch.step % 2 else "refuse")
            assert all(content == expected[sample] for sample, content in batch.loaded)


def test_processes_of_a_machine_fetch_a_shard_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def counted(self: Store, name: str, sha256: str) -> bytes:
        fetched.append(name)
        return original(self, name, sha256)

    original = Store._fetch
    monkeypatch.setattr(Store, "_fetch", counted)
    shard = place.manifest.shards[0]
    threads = [threading.Thread(target=place.store().find, args=(shard.path, shard.sha256)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [shard.path]


def test_what_leaves_the_cache_can_still_be_read_by_who_has_it_open(place: Place) -> None:
    expected = local(place)
    with place.store(cache="one").reader(place.manifest, "train", window=2) as reader:
        first = reader.read(0)
        for path in tars(place.cache / "one"):
            path.unlink()
        assert [first, reader.read(1)] == expected[:2]


def test_a_manifest_with_another_content_is_refused(place: Place) -> None:
    path = place.root / "bucket" / "data" / f"{place.manifest.digest}.json"
    path.write_text(path.read_text().replace('"samples": 20', '"samples": 20').replace('"train"', '"val"'))
    with pytest.raises(ValueError, match="is damaged"):
        place.store().manifest(place.manifest.digest)
