"""What a method remembers of other steps. Equal on all ranks, so that no rank's loss depends on which rows it saw."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from darkmatter import collectives


class Queue(nn.Module):
    """The newest `length` rows, first in, first out. Starts with random unit vectors."""

    def __init__(self, length: int, features: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.next: Tensor
        self.register_buffer("rows", F.normalize(torch.randn(length, features), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "batch features"]) -> None:
        """Takes this rank's rows, and with them those of every other rank, in rank order."""
        rows = collectives.gather(rows.detach())[-len(self.rows) :].to(self.rows.dtype)
        places = (self.next + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[places] = rows
        self.next.copy_((self.next + len(rows)) % len(self.rows))


class Bank(nn.Module):
    """A unit vector for each training sample, moved towards the newest one whenever the sample is seen.

    Z. Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3. Starts
    random. Takes `num_samples` x `features` floats on every rank and in every checkpoint.
    """

    def __init__(self, num_samples: int, features: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", F.normalize(torch.randn(num_samples, features), dim=1))

    @torch.no_grad()
    def update(self, samples: Int64[Tensor, " batch"], rows: Float[Tensor, "batch features"], momentum: float) -> None:
        """rows[samples] <- normalise(momentum old + (1 - momentum) new), for this rank's samples and all others'."""
        samples, rows = collectives.gather(samples), collectives.gather(rows.detach()).to(self.rows.dtype)
        self.rows[samples] = F.normalize(momentum * self.rows[samples] + (1 - momentum) * rows, dim=1)
