"""Is it learning or collapsing? Numbers without labels, on held-out data, the same for every objective."""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from darkmatter.console import Stopped
from darkmatter.objectives import Images, Objective


class Collapsed(Stopped):
    """The energy no longer tells compatible pairs from others: training on would only spend time."""


def auroc(low: Float[Tensor, " m"], high: Float[Tensor, " n"]) -> float:
    """P(a value of `high` > a value of `low`), ties counted half: the Mann-Whitney statistic over m n.

    NaN is no order: with any non-finite value the result is 0.5, no evidence.
    """
    values = torch.cat([low, high]).double()
    if not torch.isfinite(values).all():
        return 0.5
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[group]  # 1-based, ties share their mean
    m, n = len(low), len(high)
    return float((ranks[m:].sum() - n * (n + 1) / 2) / (m * n))


@torch.no_grad()
def pair_energies(
    objective: Objective, first: Images, second: Images
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Energies of compatible pairs (two views of one sample) and of incompatible ones (of a sample and the next)."""
    with evaluating(objective):
        return objective.energy(first, second), objective.energy(first, second.roll(1, 0))


@torch.no_grad()
def embeddings(objective: Objective, images: Images, *, batch_size: int = 256) -> Float[Tensor, "batch features"]:
    """`embed`, a part at a time, in float32 on the CPU."""
    with evaluating(objective):
        return torch.cat([objective.embed(part).float().cpu() for part in images.split(batch_size)])


@contextlib.contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Eval mode within the block, and afterwards what it was."""
    was_training = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)


def rankme(embeddings: Float[Tensor, "batch features"]) -> float:
    """Effective rank: the exponential of the entropy of the normalised singular values; 1 to min(batch, features).

    Q. Garrido, R. Balestriero, L. Najman, Y. LeCun, "RankMe" (2023), https://arxiv.org/abs/2210.02885, equation 1.
    """
    singular = torch.linalg.svdvals(embeddings.double())
    share = singular / singular.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def spread(embeddings: Float[Tensor, "batch features"]) -> float:
    """The mean over dimensions of the standard deviation of embeddings of unit length, times the root of their number: 0
    when all are one point, about 1 when they go in all directions alike.

    X. Chen, K. He, "Exploring simple Siamese representation learning" (2021), https://arxiv.org/abs/2011.10566, section 4.1.
    """
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    return float(unit.std(0).mean() * embeddings.shape[1] ** 0.5)
