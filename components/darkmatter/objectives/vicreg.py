"""VICReg: A. Bardes, J. Ponce, Y. LeCun, "Variance-invariance-covariance regularization for self-supervised learning"
(2022), https://arxiv.org/abs/2105.04906; authors' code: facebookresearch/vicreg, `main_vicreg.py`.

Energy (inference):  F(x, y) = |g(f(x)) - g(f(y))|^2 / D
Loss (training), equation 6:  lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]
Against collapse: variance keeps each dimension alive, covariance keeps them from saying the same. Neither is energy.

The coefficients mean what they mean in the authors' code: the invariance is a mean over D, and the variance term is the
mean of its two halves, [v(Z) + v(Z')] / 2. Other implementations with the same coefficients give other numbers.

Family: redundancy reduction. Choose it first: the best here after a few hundred steps. Nothing compares samples with
each other, so batches may be small and the two sides of a pair may differ in kind.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads

_EPSILON = 1e-4  # under the square root of the standard deviation, equation 2


class Config(_Config):
    invariance: float = Field(default=25.0, ge=0)
    """lambda of equation 6; section 4.2."""
    variance: float = Field(default=25.0, ge=0)
    """mu of equation 6."""
    covariance: float = Field(default=1.0, ge=0)
    """nu of equation 6."""
    projector: list[int] = Field(default=[8192, 8192, 8192], min_length=1)
    """Hidden and output features of the expander g; section 4.2."""


def invariance(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """s(Z, Z'), equation 5."""
    return F.mse_loss(first, second)


def variance(z: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """v(Z), equation 1, with gamma = 1: how far each dimension's standard deviation is below 1."""
    return F.relu(1 - torch.sqrt(z.var(0) + _EPSILON)).mean()


@heads.exact
def covariance(z: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """c(Z), equations 3 and 4: the squared covariances of different dimensions, summed, over D."""
    centred = z - z.mean(0)
    matrix = centred.T @ centred / (len(z) - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]


class VICReg(Objective):
    against_collapse: ClassVar[Mechanism] = "regularised"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.config = config
        self.projector = heads.projector([backbone.num_features, *config.projector])

    def _expand(self, x: Images) -> Float[Tensor, "batch dim"]:
        return heads.full_precision(self.projector(self.backbone(x)))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return (self._expand(x) - self._expand(y)).square().mean(1)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        first, second = map(self._expand, views)  # one by one, as the authors do: batch norm sees one view at a time
        s = invariance(first, second)
        first, second = collectives.gather(first), collectives.gather(second)
        v = (variance(first) + variance(second)) / 2
        c = covariance(first) + covariance(second)
        weighted = self.config.invariance * s + self.config.variance * v + self.config.covariance * c
        return total(weighted, invariance=s, variance=v, covariance=c)


def build(config: Config, backbone: Backbone, num_samples: int) -> VICReg:
    return VICReg(config, backbone)
