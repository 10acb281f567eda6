from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from darkmatter import shards, stream

SAMPLES, BATCH = 103, 12


@pytest.fixture
def reader(tmp_path: Path) -> shards.Reader:
    samples = [shards.Sample(key=f"{n:032x}", content=n.to_bytes(2, "big"), extension="png") for n in range(SAMPLES)]
    parts = [
        shards.write_shard(tmp_path / f"train-{n}.tar", samples[n * 40 : n * 40 + 40], split="train") for n in range(3)
    ]
    with shards.Reader(tmp_path, shards.Manifest(classes=None, shards=parts), "train") as reader:
        yield reader


def load(contents: Sequence[bytes], samples: np.ndarray, *, epoch: int) -> list[int]:
    assert [int.from_bytes(one, "big") for one in contents] == samples.tolist()
    return samples.tolist()


def run(reader: shards.Reader, start: int, stop: int, **options: int) -> list[list[int]]:
    made = stream.Stream(reader, load, batch_size=BATCH, seed=options.pop("seed", 0), **options)
    return [batch.loaded for batch in made.batches(start, stop)]


def test_an_epoch_has_no_sample_twice_and_the_next_has_another_order(reader: shards.Reader) -> None:
    steps = SAMPLES // BATCH
    first, second = run(reader, 0, steps), run(reader, steps, 2 * steps)
    for epoch in (first, second):
        seen = [sample for batch in epoch for sample in batch]
        assert len(set(seen)) == len(seen) == steps * BATCH
    assert first != second
    assert first != run(reader, 0, steps, seed=1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch_in_the_same_order(reader: shards.Reader, world_size: int) -> None:
    shares = [run(reader, 0, 10, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [[sample for part in parts for sample in part] for parts in zip(*shares, strict=True)]
    assert joined == run(reader, 0, 10)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(reader: shards.Reader, threads: int) -> None:
    assert run(reader, 0, 20, threads=threads) == run(reader, 0, 20)


def test_resuming_at_any_step_gives_what_would_have_come(reader: shards.Reader) -> None:
    whole = run(reader, 0, 20)
    for start in range(0, 20, 3):
        assert run(reader, start, 20) == whole[start:]


def test_resuming_with_another_number_of_ranks_neither_skips_nor_repeats(reader: shards.Reader) -> None:
    before = run(reader, 0, 5)
    after = [run(reader, 5, 8, rank=rank, world_size=3) for rank in range(3)]
    joined = [[sample for part in parts for sample in part] for parts in zip(*after, strict=True)]
    assert before + joined == run(reader, 0, 8)


def test_batches_name_their_step_and_epoch(reader: shards.Reader) -> None:
    made = stream.Stream(reader, load, batch_size=BATCH, seed=0)
    assert made.steps_per_epoch == 8
    assert [(batch.step, batch.epoch) for batch in made.batches(7, 10)] == [(7, 0), (8, 1), (9, 1)]


def test_impossible_batches_are_refused(reader: shards.Reader) -> None:
    with pytest.raises(ValueError, match="cannot be shared evenly by 5"):
        stream.Stream(reader, load, batch_size=BATCH, seed=0, world_size=5)
    with pytest.raises(ValueError, match="over the 103 training samples"):
        stream.Stream(reader, load, batch_size=104, seed=0)


def test_an_error_in_loading_reaches_the_loop(reader: shards.Reader) -> None:
    def broken(contents: Sequence[bytes], samples: np.ndarray, *, epoch: int) -> list[int]:
        raise OSError("disk gone")

    made = stream.Stream(reader, broken, batch_size=BATCH, seed=0, threads=2)
    with pytest.raises(OSError, match="disk gone"):
        list(made.batches(0, 5))


def test_permutation_is_the_same_on_every_platform() -> None:
    """A literal: a change of it would silently reorder every run."""
    assert stream.permutation(3, 1, 10).tolist() == [2, 4, 0, 5, 8, 1, 3, 9, 7, 6]
