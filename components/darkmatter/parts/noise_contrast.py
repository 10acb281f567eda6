"""Telling a sample's own score from those of noise, where a sum over all samples would cost too much.

M. Gutmann, A. Hyvarinen, "Noise-contrastive estimation" (2010), as Z. Wu et al. 2018 (https://arxiv.org/abs/1805.01978) put
it to use; the noise is drawn evenly from the n training samples, P_n = 1 / n.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.parts import memory


def nce(
    own: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch negatives"],
    constant: Float[Tensor, ""],
    num_samples: int,
) -> Float[Tensor, ""]:
    """Equations 6 and 7 of Wu et al.: -log h(own) - sum over m noise scores of log(1 - h(noise)), mean over the batch, with
    h = P / (P + m / n) and P = exp(score) / constant."""
    shift = constant.log() + math.log(noise.shape[1] / num_samples)
    return (F.softplus(shift - own) + F.softplus(noise - shift).sum(1)).mean()  # h = sigmoid(score - shift)


def partition(
    own: Float[Tensor, " batch"], noise: Float[Tensor, "batch negatives"], num_samples: int
) -> Float[Tensor, ""]:
    """Equation 8: the constant, from the scores of the global batch; the own ones count, as in the authors' code."""
    scores = torch.cat([own[:, None], noise], dim=1).detach()
    return num_samples * collectives.mean(scores.exp().mean())


class Discrimination(nn.Module):
    """Tells samples apart by a bank of their features; the constant is estimated in the first step and kept."""

    def __init__(self, num_samples: int, features: int) -> None:
        super().__init__()
        self.bank = memory.Bank(num_samples, features)
        self.constant: Tensor
        self.register_buffer("constant", torch.zeros(()))  # 0: not estimated yet
        self._estimate: Tensor | None = None
        self._newest: tuple[Tensor, Tensor] | None = None

    def losses(
        self,
        features: Sequence[Float[Tensor, "batch features"]],
        samples: Int64[Tensor, " batch"],
        negatives: int,
        temperature: float,
    ) -> list[Float[Tensor, ""]]:
        """`nce` of each of these unit vectors of the samples, against the same noise. The first estimates the constant."""
        rows = self.bank.rows
        drawn = collectives.draw(
            lambda size: torch.randint(len(rows), (size, negatives), device=rows.device), len(samples)
        )
        own_rows, noise_rows = rows[samples], rows[drawn]
        scores = [((v * own_rows).sum(1), torch.einsum("bd,bmd->bm", v, noise_rows)) for v in features]
        scores = [(own / temperature, noise / temperature) for own, noise in scores]
        self._estimate = torch.where(self.constant > 0, self.constant, partition(*scores[0], len(rows)))
        return [nce(own, noise, self._estimate, len(rows)) for own, noise in scores]

    def see(self, samples: Int64[Tensor, " batch"], features: Float[Tensor, "batch features"]) -> None:
        """Keeps what `follow` will need of this step."""
        self._newest = samples, features.detach()

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """After a step: the rows of the samples seen, with this momentum, and the constant."""
        if self._newest is not None:
            self.bank.update(*self._newest, momentum)
            if self._estimate is not None:
                self.constant.copy_(self._estimate)
        self._newest = self._estimate = None
