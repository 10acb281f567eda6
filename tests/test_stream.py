import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from darkmatter import shards, stream

SIZES, BATCH = (40, 40, 23, 17, 40), 24
SAMPLES = sum(SIZES)
EPOCH = SAMPLES // BATCH
every_window = pytest.mark.parametrize("window", [0, 1, 2, 5])


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[shards.Reader]:
    samples = (shards.Sample(key=f"{n:032x}", content=n.to_bytes(2, "big"), extension="png") for n in itertools.count())
    parts = [
        shards.write_shard(tmp_path / f"train-{n}.tar", itertools.islice(samples, size), split="train")
        for n, size in enumerate(SIZES)
    ]
    with shards.Reader(tmp_path, shards.Manifest(classes=None, shards=parts), "train") as reader:
        yield reader


def load(contents: Sequence[bytes], samples: np.ndarray, *, epoch: int) -> list[int]:
    assert [int.from_bytes(one, "big") for one in contents] == samples.tolist()
    return samples.tolist()


def run(reader: shards.Reader, start: int, stop: int, **options: int) -> list[list[int]]:
    made = stream.Stream(reader, load, batch_size=BATCH, seed=options.pop("seed", 0), **options)
    return [batch.loaded for batch in made.batches(start, stop)]


def joined(reader: shards.Reader, start: int, stop: int, *, world_size: int, **options: int) -> list[list[int]]:
    """What all ranks see, put together."""
    shares = [run(reader, start, stop, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    return [[sample for part in parts for sample in part] for parts in zip(*shares, strict=True)]


@every_window
def test_an_epoch_has_no_sample_twice_and_the_next_has_another_order(reader: shards.Reader, window: int) -> None:
    first, second = run(reader, 0, EPOCH, window=window), run(reader, EPOCH, 2 * EPOCH, window=window)
    for epoch in (first, second):
        seen = [sample for batch in epoch for sample in batch]
        assert len(set(seen)) == len(seen) == EPOCH * BATCH
    assert first != second
    assert first != run(reader, 0, EPOCH, window=window, seed=1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_part_of_a_batch_holds_the_same_samples_on_any_number_of_ranks(
    reader: shards.Reader, world_size: int
) -> None:
    whole = run(reader, 0, 10)
    shares = [run(reader, 0, 10, rank=rank, world_size=world_size, parts=4) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [np.split(np.array(share[step]), 4) for share in shares]
        assert [sample for part in zip(*parts, strict=True) for rank in part for sample in rank] == batch


@every_window
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_global_batch_in_the_same_order(reader: shards.Reader, world_size: int, window: int) -> None:
    assert joined(reader, 0, 10, world_size=world_size, window=window) == run(reader, 0, 10, window=window)


@every_window
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(reader: shards.Reader, threads: int, window: int) -> None:
    assert run(reader, 0, 20, threads=threads, window=window) == run(reader, 0, 20, window=window)


@every_window
def test_resuming_at_any_step_gives_what_would_have_come(reader: shards.Reader, window: int) -> None:
    whole = run(reader, 0, 20, window=window)
    for start in range(20):
        assert run(reader, start, 20, window=window) == whole[start:]


@every_window
def test_changing_the_number_of_ranks_in_the_middle_neither_skips_nor_repeats(
    reader: shards.Reader, window: int
) -> None:
    parts = [
        joined(reader, start, stop, world_size=world_size, window=window)
        for start, stop, world_size in [(0, 3, 1), (3, 5, 3), (5, 12, 8), (12, 14, 2)]
    ]
    assert [batch for part in parts for batch in part] == run(reader, 0, 14, window=window)


@pytest.mark.parametrize("window", [1, 2])
def test_a_window_is_read_to_its_end_before_the_next_but_one_begins(window: int) -> None:
    """What the cache of a machine relies on: at no place are other shards needed than those announced for it."""
    order = stream.Order(3, SIZES, window)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    for epoch in range(3):
        for place in range(SAMPLES):
            (sample,) = order.samples(epoch, place, place + 1)
            announced = order.shards(epoch, place)
            assert shard_of[sample] in announced[:window]
            assert len(announced) <= 2 * window
    # The last window announces the first of the next epoch.
    assert set(order.shards(1, 0)[:window]) <= set(order.shards(0, SAMPLES - 1))


def spread(order: stream.Order, samples: int) -> tuple[float, float]:
    """Rank correlation of two epochs' orders, and how far apart neighbours of a shard land, in shares of an epoch."""
    first, second = (np.argsort(order.samples(epoch, 0, samples)) for epoch in (0, 1))
    return float(stats.spearmanr(first, second).statistic), float(np.abs(np.diff(first)).mean() / samples)


def test_shuffling_is_as_good_as_a_permutation_or_as_the_window_allows() -> None:
    sizes = [250] * 80
    samples = sum(sizes)
    correlation, apart = spread(stream.Order(0, sizes), samples)
    assert abs(correlation) < 4 / samples**0.5  # four standard errors
    assert abs(apart - 1 / 3) < 0.01  # of two uniform places
    for window in (1, 4, 16):
        correlation, apart = spread(stream.Order(0, sizes, window), samples)
        assert abs(correlation) < 4 / len(sizes) ** 0.5  # shards in an order of their own: as many ranks as shards
        assert abs(apart - window / len(sizes) / 3) < 0.02


@every_window
def test_a_million_samples_resume_without_the_epoch_before(window: int) -> None:
    """Only the window at hand is mixed."""
    order = stream.Order(0, [1000] * 1000, window)
    at_once = order.samples(3, 777_000, 777_064)
    assert order._mixed.cache_info().misses <= 2
    whole = stream.Order(0, [1000] * 1000, window).samples(3, 0, 10**6)
    assert (whole[777_000:777_064] == at_once).all()
    assert (np.sort(whole) == np.arange(10**6)).all()


def test_batches_name_their_step_and_epoch(reader: shards.Reader) -> None:
    made = stream.Stream(reader, load, batch_size=BATCH, seed=0)
    assert made.steps_per_epoch == EPOCH == 6
    assert [(batch.step, batch.epoch) for batch in made.batches(5, 8)] == [(5, 0), (6, 1), (7, 1)]


def test_impossible_batches_are_refused(reader: shards.Reader) -> None:
    with pytest.raises(ValueError, match="cannot be shared evenly by 5"):
        stream.Stream(reader, load, batch_size=BATCH, seed=0, world_size=5)
    with pytest.raises(ValueError, match="over the 160 training samples"):
        stream.Stream(reader, load, batch_size=161, seed=0)


def test_an_error_in_loading_reaches_the_loop(reader: shards.Reader) -> None:
    def broken(contents: Sequence[bytes], samples: np.ndarray, *, epoch: int) -> list[int]:
        raise OSError("disk gone")

    made = stream.Stream(reader, broken, batch_size=BATCH, seed=0, threads=2)
    with pytest.raises(OSError, match="disk gone"):
        list(made.batches(0, 5))


def test_permutation_is_the_same_on_every_platform() -> None:
    """Literals: a change of them would silently reorder every run."""
    assert stream.permutation(3, 1, 10).tolist() == [2, 4, 0, 5, 8, 1, 3, 9, 7, 6]
    assert stream.Order(3, [4, 3, 3]).samples(1, 0, 10).tolist() == [2, 4, 0, 5, 8, 1, 3, 9, 7, 6]
    assert stream.Order(3, [4, 3, 3], 2).samples(1, 0, 10).tolist() == [8, 4, 9, 7, 5, 6, 1, 2, 3, 0]
