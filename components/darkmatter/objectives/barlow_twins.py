"""Barlow Twins: J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: self-supervised learning via redundancy
reduction" (2021), https://arxiv.org/abs/2103.03230; authors' code: facebookresearch/barlowtwins, `main.py`.

Energy (inference):  F(x, y) = |z(x) - z(y)|^2 / D, projections z with each dimension at mean 0 and variance 1
Loss (training), equation 1:  sum over i of (1 - C_ii)^2 + lambda, sum over i and j != i of C_ij^2
Against collapse: C is a correlation, of z over the batch, so that a dimension that says nothing cannot reach C_ii = 1; the
off-diagonal keeps dimensions from saying the same. Neither is energy.

C is that of the global batch. The authors sum it over ranks without its gradient, which leaves them with 1 / ranks of the
gradient (their optimizer LARS is blind to its scale); here the gradient is the whole one.

Family: redundancy reduction. Choose it when batches are small and projections may be wide.
"""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads


class Config(_Config):
    off_diagonal: float = Field(default=0.0051, ge=0)
    """lambda of equation 1; `main.py`. Section 2.2 says 0.005; the loss is not sensitive to it, section 4."""
    projector: list[int] = Field(default=[8192, 8192, 8192], min_length=1)
    """Hidden and output features of the projector; section 2.2. The method gains from wide ones, section 4."""


@heads.exact
def cross_correlation(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]
) -> Float[Tensor, "dim dim"]:
    """C, equation 2, over the global batch; each dimension of the arguments has mean 0 and variance 1 there."""
    return collectives.mean(first.T @ second / len(first))


def on_diagonal(c: Float[Tensor, "dim dim"]) -> Float[Tensor, ""]:
    """The invariance term of equation 1."""
    return (1 - c.diagonal()).square().sum()


def off_diagonal(c: Float[Tensor, "dim dim"]) -> Float[Tensor, ""]:
    """The redundancy reduction term of equation 1, before lambda."""
    return c.square().sum() - c.diagonal().square().sum()


class BarlowTwins(Objective):
    against_collapse: ClassVar[Mechanism] = "regularised"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.config = config
        self.projector = heads.projector([backbone.num_features, *config.projector])
        self.normalise = nn.BatchNorm1d(config.projector[-1], affine=False)

    def _project(self, x: Images) -> Float[Tensor, "batch dim"]:
        return self.normalise(heads.full_precision(self.projector(self.backbone(x))))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return (self._project(x) - self._project(y)).square().mean(1)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        first, second = map(self._project, views)  # one by one, as the authors do: batch norm sees one view at a time
        c = cross_correlation(first, second)
        on, off = on_diagonal(c), off_diagonal(c)
        return total(on + self.config.off_diagonal * off, on_diagonal=on, off_diagonal=off)


def build(config: Config, backbone: Backbone, num_samples: int) -> BarlowTwins:
    return BarlowTwins(config, backbone)
