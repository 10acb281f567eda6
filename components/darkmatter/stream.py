"""Batches in a global order that depends on (seed, epoch, number of samples) alone.

order = permutation(seed, epoch); the position is one integer, the step; a rank's share is a slice of the global batch.
So any number of ranks, loader threads and restarts sees the same samples in the same steps, and resuming costs nothing.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int64

from darkmatter.shards import Reader

Loaded = TypeVar("Loaded")


def permutation(seed: int, epoch: int, samples: int) -> Int64[np.ndarray, " samples"]:
    """The order of an epoch (Philox: the same on every platform)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)


def steps_per_epoch(samples: int, batch_size: int, world_size: int) -> int:
    """How many whole batches there are; the rest of a permutation is left out, another one each epoch.

    Raises:
        ValueError: the batch cannot be shared out evenly, or is larger than the data.
    """
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world_size} workers")
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
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
    ) -> None:
        """
        Args:
            reader: the samples.
            load: called with contents, sample numbers and `epoch=`, in several threads at once; makes of them what training
                wants.
            batch_size: of the global batch.
            seed: of the order.
            rank: which share of each batch to yield.
            world_size: how many shares there are.
            threads: how many batches are loaded at once.

        Raises:
            ValueError: as `steps_per_epoch`.
        """
        self._reader, self._load, self._seed = reader, load, seed
        self._batch_size, self._threads = batch_size, threads
        self._cached: tuple[int, Int64[np.ndarray, " samples"]] = (-1, np.empty(0, np.int64))
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self.steps_per_epoch = steps_per_epoch(len(reader), batch_size, world_size)

    def samples(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Which samples this rank sees in a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._orders(epoch)
        return order[within * self._batch_size : (within + 1) * self._batch_size][self._share]

    def batches(self, start: int, stop: int) -> Iterator[Batch[Loaded]]:
        """Steps `start` to `stop`, in order."""
        ahead: collections.deque[Future[Batch[Loaded]]] = collections.deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="stream") as pool:
            try:
                for step in range(start, stop):
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

    def _orders(self, epoch: int) -> Int64[np.ndarray, " samples"]:
        if self._cached[0] != epoch:
            self._cached = (epoch, permutation(self._seed, epoch, len(self._reader)))
        return self._cached[1]
