"""SimCLR: T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A simple framework for contrastive learning of visual
representations" (2020), https://arxiv.org/abs/2002.05709; authors' code: google-research/simclr, `objective.py`.

Energy (inference):  F(x, y) = -cos(g(f(x)), g(f(y))) / temperature
Loss (training), equation 1, mean over all 2N views:  -log( exp(-F(i, j)) / sum over k != i of exp(-F(i, k)) )
Against collapse: every other sample of the global batch is pushed to a higher energy.

Family: contrastive. Choose it when you want the simplest thing that works, the better the larger the batch: no teacher,
memory or schedule. Second best here after a few hundred steps of 128 images.
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


class Config(_Config):
    temperature: float = Field(default=0.1, gt=0)
    """Section 5.1 finds 0.1 best at batch sizes up to 8192 trained to convergence."""
    projector: list[int] = Field(default=[2048, 128], min_length=1)
    """Hidden and output features of g; section 4.2 and appendix B.9 use 2048 and 128 with a ResNet-50."""


@heads.exact
def nt_xent(
    first: Float[Tensor, "batch features"], second: Float[Tensor, "batch features"], temperature: float
) -> Float[Tensor, ""]:
    """Equation 1 for this rank's 2N views against those of the global batch. The arguments have unit length."""
    batch, offset = len(first), collectives.rank() * len(first)
    everyone = torch.cat([collectives.gather(first), collectives.gather(second)])  # (2 M, D), M = global batch
    others = len(everyone) // 2
    own = torch.arange(offset, offset + batch, device=first.device)
    place = torch.cat([own, own + others])  # of this rank's views in `everyone`
    partner = torch.cat([own + others, own])
    similarity = torch.cat([first, second]) @ everyone.T / temperature  # (2 N, 2 M)
    similarity = similarity.scatter(1, place[:, None], float("-inf"))  # k != i
    return F.cross_entropy(similarity, partner)


class SimCLR(Objective):
    against_collapse: ClassVar[Mechanism] = "contrastive"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.temperature = config.temperature
        self.projector = heads.projector([backbone.num_features, *config.projector])

    def _project(self, x: Images) -> Float[Tensor, "batch features"]:
        return F.normalize(heads.full_precision(self.projector(self.backbone(x))), dim=1)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return -(self._project(x) * self._project(y)).sum(1) / self.temperature

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        first, second = self._project(torch.cat(list(views))).chunk(2)
        nt_xent_loss = nt_xent(first, second, self.temperature)
        return total(nt_xent_loss, nt_xent=nt_xent_loss)


def build(config: Config, backbone: Backbone, num_samples: int) -> SimCLR:
    return SimCLR(config, backbone)
