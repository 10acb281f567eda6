"""Batches in a global order that depends on (seed, epoch, manifest) alone.

order = permutation(seed, epoch); the position is one integer, the step; a rank's share is a slice of the global batch.
So any number of ranks, loader threads and restarts sees the same samples in the same steps, and resuming costs nothing.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int64

from darkmatter.shards import Reader

Loaded = TypeVar("Loaded")


def permutation(seed: int, epoch: int, count: int, part: int = 0) -> Int64[np.ndarray, " count"]:
    """The order of an epoch, or of a part of it (Philox: the same on every platform)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, part])).permutation(count)


class Order:
    """The order of every epoch over the samples of some shards.

    One permutation of all samples; or, for shards that come over a network into a cache that cannot hold them all, shards
    in an order of their own and the samples of a few neighbouring ones mixed, window after window.
    """

    def __init__(self, seed: int, sizes: Sequence[int], window: int = 0) -> None:
        """
        Args:
            seed: of all epochs.
            sizes: how many samples each shard has; samples are numbered through.
            window: how many shards are mixed at a time; 0 for all.
        """
        self._seed, self._window = seed, min(window, len(sizes))
        self._starts = np.cumsum([0, *sizes])
        # The end of one window, or epoch, and the beginning of the next are asked for in turns.
        self._windows = functools.lru_cache(2)(self._make_windows)
        self._mixed = functools.lru_cache(2)(self._mix)
        self._near = functools.lru_cache(2)(self._find_near)

    def samples(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " samples"]:
        """The samples at these places of an epoch. Nothing before them is computed but where the windows begin."""
        _, begins = self._windows(epoch)
        first, last = self._window_of(begins, start), self._window_of(begins, stop - 1)
        parts = [self._mixed(epoch, window) for window in range(first, last + 1)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole[start - begins[first] : stop - begins[first]]

    def shards(self, epoch: int, place: int) -> tuple[int, ...]:
        """The shards of the window that a place is in, and of the one after it, which may be in the next epoch."""
        return self._near(epoch, self._window_of(self._windows(epoch)[1], place))

    @staticmethod
    def _window_of(begins: Int64[np.ndarray, " windows"], place: int) -> int:
        return int(np.searchsorted(begins, place, side="right")) - 1

    def _find_near(self, epoch: int, window: int) -> tuple[int, ...]:
        windows, _ = self._windows(epoch)
        later = windows[window + 1] if window + 1 < len(windows) else self._windows(epoch + 1)[0][0]
        return tuple(dict.fromkeys([*windows[window].tolist(), *later.tolist()]))

    def _make_windows(self, epoch: int) -> tuple[list[Int64[np.ndarray, " _"]], Int64[np.ndarray, " windows"]]:
        """The shards of each window, and the place at which each begins."""
        count = len(self._starts) - 1
        if not self._window:
            return [np.arange(count)], np.zeros(1, np.int64)
        windows = np.split(permutation(self._seed, epoch, count), range(self._window, count, self._window))
        sizes = np.diff(self._starts)
        return windows, np.cumsum([0, *(sizes[window].sum() for window in windows)])[:-1]

    def _mix(self, epoch: int, window: int) -> Int64[np.ndarray, " samples"]:
        if not self._window:
            return permutation(self._seed, epoch, int(self._starts[-1]))
        members = self._windows(epoch)[0][window]
        samples = np.concatenate([np.arange(self._starts[one], self._starts[one + 1]) for one in members])
        return samples[permutation(self._seed, epoch, len(samples), 1 + window)]


def steps_per_epoch(samples: int, batch_size: int, shares: int) -> int:
    """How many whole batches there are; the rest of a permutation is left out, another one each epoch. `shares` are the
    workers, times the parts of a batch.

    Raises:
        ValueError: the batch cannot be shared out evenly, or is larger than the data.
    """
    if batch_size % shares:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {shares} (workers x pretrain.accumulate)")
    if batch_size > samples:
        raise ValueError(f"the batch size {batch_size} is over the {samples} training samples; lower it")
    return samples // batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Generic[Loaded]):
    """One rank's share of one global batch."""

    step: int
    epoch: int
    loaded: Loaded


class Stream(Generic[Loaded]):
    """Reads and decodes ahead in threads (decoders release the interpreter's lock)."""

    def __init__(
        self,
        reader: Reader,
        load: Callable[..., Loaded],
        *,
        batch_size: int,
        seed: int,
        window: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        threads: int = 1,
    ) -> None:
        """
        Args:
            reader: the samples.
            load: called with contents, sample numbers and `epoch=`, in several threads at once; makes of them what training
                wants.
            batch_size: of the global batch.
            seed: of the order.
            window: of the order.
            rank: which share of each batch to yield.
            world_size: how many shares there are.
            parts: that a batch is trained in, one after the other. Each is shared by the ranks, so that it holds the same
                samples on any number of them.
            threads: how many batches are loaded at once.

        Raises:
            ValueError: as `steps_per_epoch`.
        """
        self._reader, self._load = reader, load
        self._batch_size, self._threads = batch_size, threads
        self._order = Order(seed, reader.sizes, window)
        self.steps_per_epoch = steps_per_epoch(len(reader), batch_size, world_size * parts)
        self._share = np.arange(batch_size).reshape(parts, world_size, -1)[:, rank].ravel()

    def samples(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Which samples this rank sees in a step."""
        epoch, start = self._place(step)
        return self._order.samples(epoch, start, start + self._batch_size)[self._share]

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch, and place in its order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within * self._batch_size

    def batches(self, start: int, stop: int) -> Iterator[Batch[Loaded]]:
        """Steps `start` to `stop`, in order."""
        ahead: collections.deque[Future[Batch[Loaded]]] = collections.deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="stream") as pool:
            try:
                for step in range(start, stop):
                    self._reader.expect(self._order.shards(*self._place(step)))
                    ahead.append(pool.submit(self._batch, step, self.samples(step)))
                    if len(ahead) > 2 * self._threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _batch(self, step: int, samples: Int64[np.ndarray, " batch"]) -> Batch[Loaded]:
        epoch = step // self.steps_per_epoch
        loaded = self._load([self._reader.read(index) for index in samples.tolist()], samples, epoch=epoch)
        return Batch(step=step, epoch=epoch, loaded=loaded)
