"""Is it learning or collapsing? Numbers without labels, on held-out data, the same for every objective."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
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


def lidar(views: Float[Tensor, "samples views features"], *, delta: float = 1e-4) -> float:
    """Effective rank of what tells samples apart, against what differs between views of one: 1 to the number of features.

    V. Thilak et al., "LiDAR" (2023), https://arxiv.org/abs/2312.04000, section 4, equations 1 to 3; there 1,000 samples with
    50 views each.
    """
    views = views.double()
    means = views.mean(1)
    apart, within = means - means.mean(0), (views - means[:, None]).flatten(0, 1)
    between = apart.T @ apart / len(apart)
    noise = within.T @ within / len(within) + delta * torch.eye(within.shape[1], dtype=within.dtype)
    values, vectors = torch.linalg.eigh(noise)
    whiten = vectors / values.clamp_min(delta / 2).sqrt() @ vectors.T
    found = torch.linalg.eigvalsh(whiten @ between @ whiten).clamp_min(0)
    share = found / found.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def alpha_req(embeddings: Float[Tensor, "batch features"], *, first: int = 5, last: int = 50) -> float:
    """How fast the eigenvalues of the covariance fall: alpha of j^-alpha, fitted to ranks `first` to `last` on logarithms,
    each weighted by 1 / j. Near 1 is best; larger, few dimensions carry all.

    K. Agrawal et al., "alpha-ReQ" (2022), https://openreview.net/forum?id=ii9X4vtZGTZ, section 3; the fit is that of C.
    Stringer et al., "High-dimensional geometry of population responses in visual cortex" (2019).
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    values = torch.linalg.svdvals(centred).square() / max(1, len(centred) - 1)
    values = values[values > 1e-12 * values[0].clamp_min(1e-300)][:last]
    start = min(first, max(1, len(values) - 1)) - 1  # a spectrum shorter than that is fitted as far as it goes
    values = values[start:]
    if len(values) < 2:
        return float("inf")
    ranks = torch.arange(start + 1, start + 1 + len(values), dtype=values.dtype)
    weight = 1 / ranks
    x, y = ranks.log(), values.log()
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


def alignment(first: Float[Tensor, "batch features"], second: Float[Tensor, "batch features"]) -> float:
    """Mean squared distance of two views of a sample, of unit length: 0 when they agree, 2 when they have nothing in common.

    T. Wang, P. Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere" (2020), https://arxiv.org/abs/2005.10242, section 4.1, alpha = 2.
    """
    one, two = (F.normalize(part.double(), dim=1) for part in (first, second))
    return float((one - two).square().sum(1).mean())


def uniformity(embeddings: Float[Tensor, "batch features"]) -> float:
    """Logarithm of the mean of exp(-2 |x - y|^2) over all pairs, of unit length: 0 when all are one point, down to -4.

    T. Wang, P. Isola (2020), as above, t = 2.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    return float(torch.pdist(unit).square().mul(-2).exp().mean().log())


def spread(embeddings: Float[Tensor, "batch features"]) -> float:
    """The mean over dimensions of the standard deviation of embeddings of unit length, times the root of their number: 0
    when all are one point, about 1 when they go in all directions alike.

    X. Chen, K. He, "Exploring simple Siamese representation learning" (2021), https://arxiv.org/abs/2011.10566, section 4.1.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    return float(unit.std(0).mean() * embeddings.shape[1] ** 0.5)
