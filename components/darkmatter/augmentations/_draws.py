"""Random numbers that depend on who asks, not on who asked before: counter-based, for a whole batch at once.

SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in int64 tensor
arithmetic, which wraps: the same numbers on CPU and GPU, for any batch size and any number of processes.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # logical, where >> on int64 is arithmetic


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


class Draws:
    """One stream of random numbers for each sample of a batch; each call takes the next of every stream."""

    def __init__(self, keys: Int64[Tensor, " batch"]) -> None:
        self._keys = keys
        self._count = 0

    @classmethod
    def of(
        cls, *, seed: int, epoch: int, samples: Int64[Tensor, " batch"], view: int | Int64[Tensor, " batch"]
    ) -> "Draws":
        """Of one view of all samples, or of one for each."""
        keys = samples
        for part in (seed, epoch, view):
            step = part * _GOLDEN if isinstance(part, Tensor) else _signed(part * _GOLDEN % 2**64)
            keys = _mix(keys * _GOLDEN + step + 1)
        return cls(keys)

    def units(self, count: int) -> Float[Tensor, "batch {count}"]:
        """The next `count` numbers of every stream, float32 in [0, 1)."""
        steps = torch.arange(self._count + 1, self._count + 1 + count, device=self._keys.device)
        self._count += count
        return _shift(_mix(self._keys[:, None] + steps * _GOLDEN), 40).to(torch.float32) * 2.0**-24

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Float[Tensor, " batch"]:
        """float32 in [low, high)."""
        return low + (high - low) * self.units(1)[:, 0]

    def chance(self, probability: float | Float[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        return self.uniform() < probability
