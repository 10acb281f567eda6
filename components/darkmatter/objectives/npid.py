"""NPID, instance discrimination: Z. Wu, Y. Xiong, S. X. Yu, D. Lin, "Unsupervised feature learning via non-parametric
instance discrimination" (2018), https://arxiv.org/abs/1805.01978; authors' code: zhirongw/lemniscate.pytorch,
`lib/NCEAverage.py`, `lib/NCECriterion.py`, `lib/LinearAverage.py`.

Energy (inference):  F(x, y) = -cos(v(x), v(y)) / temperature
Loss (training), equation 10, n samples, m of them drawn as noise, P(i | v) = exp(bank_i . v / temperature) / Z:
    -log h(own) + lambda |v - bank_own|^2 - sum over the noise of log(1 - h(noise)),  h = P / (P + m / n)
Against collapse: features of other samples, remembered in a bank, are pushed to a higher energy. One view is enough: the
other one is what the bank remembers of the sample.

Z is a constant, estimated from the first batch (equation 8). The proximal term is a regulariser and not energy. The authors'
code has none: it averages the rows of the bank instead, which its author calls equivalent (issue 11); so do the
defaults. Its epsilon of 1e-7 in the denominators of h is left out.

Family: contrastive. Choose it when there is one view a sample and memory for a vector of each. The cheapest steps here,
and it needs many: tens of visits to each sample.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads, noise_contrast


class Config(_Config):
    features: int = Field(default=128, gt=0)
    """Output features of the linear head, and of each row of the bank; section 4.2."""
    temperature: float = Field(default=0.07, gt=0)
    """Section 4.2."""
    negatives: int = Field(default=4096, ge=0)
    """m of equation 7, section 4.2. 0: the exact softmax over all samples, equation 2."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Of a row of the bank when its sample is seen; `main.py` of the authors. Many short epochs want more, up to 0.99."""
    proximal: float = Field(default=0.0, ge=0)
    """lambda of equation 9, section 3.3; 0 in the authors' code."""


@heads.exact
def exact_softmax(
    v: Float[Tensor, "batch features"], rows: Float[Tensor, "all features"], samples: Samples, temperature: float
) -> Float[Tensor, ""]:
    """Equation 2: -log P(own | v) against every row of the bank."""
    return F.cross_entropy(v @ rows.T / temperature, samples)


def proximal(v: Float[Tensor, "batch features"], before: Float[Tensor, "batch features"]) -> Float[Tensor, ""]:
    """Equation 9: how far the features moved since the sample was last seen."""
    return (v - before).square().sum(1).mean()


class NPID(Objective):
    against_collapse: ClassVar[Mechanism] = "contrastive"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone, num_samples: int) -> None:
        super().__init__(backbone)
        self.config = config
        self.head = nn.Linear(backbone.num_features, config.features)
        self.memory = noise_contrast.Discrimination(num_samples, config.features)

    def _feature(self, x: Images) -> Float[Tensor, "batch features"]:
        return F.normalize(heads.full_precision(self.head(self.backbone(x))), dim=1)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return -(self._feature(x) * self._feature(y)).sum(1) / self.config.temperature

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        v, rows, config = self._feature(views[0]), self.memory.bank.rows, self.config
        if config.negatives:
            (discrimination,) = self.memory.losses([v], samples, config.negatives, config.temperature)
        else:
            discrimination = exact_softmax(v, rows, samples, config.temperature)
        moved = proximal(v, rows[samples])
        self.memory.see(samples, v)
        return total(discrimination + config.proximal * moved, discrimination=discrimination, proximal=moved)

    def after_step(self, progress: float) -> None:
        self.memory.follow(self.config.momentum)


def build(config: Config, backbone: Backbone, num_samples: int) -> NPID:
    return NPID(config, backbone, num_samples)
