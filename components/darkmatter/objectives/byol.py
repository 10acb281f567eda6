"""BYOL: J.-B. Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning" (2020),
https://arxiv.org/abs/2006.07733; authors' code: google-deepmind/deepmind-research, `byol/byol_experiment.py`.

Energy (inference):  F(x, y) = |q(z(x)) / |q(z(x))| - z'(y) / |z'(y)||^2, from prediction to target, section 3.1
Loss (training), equation 2, both ways round:  mean of F(x, y) + F(y, x)
Against collapse: asymmetry. The target z' comes from a teacher that no gradient reaches, an average of past weights, and
only the online side has a predictor q. Without the predictor the loss falls to 0 and the energy is flat.

Family: distillation. Choose it when batches are small and there is time for a long run; it is slower to start than others.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads, teacher


class Config(_Config):
    projector: list[int] = Field(default=[4096, 256], min_length=1)
    """Hidden and output features of the projector; section 3.3."""
    predictor: int = Field(default=4096, gt=0)
    """Hidden features of the predictor; section 3.3."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; it rises to 1 along a cosine. Section 3.3. Short runs want less: 0.99 and below."""


def distance(
    prediction: Float[Tensor, "batch features"], target: Float[Tensor, "batch features"]
) -> Float[Tensor, " batch"]:
    """Equation 2: the squared distance of the directions, 2 - 2 cos."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


class BYOL(Objective):
    against_collapse: ClassVar[Mechanism] = "asymmetric"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.momentum = config.momentum
        features = config.projector[-1]
        self.projector = heads.projector([backbone.num_features, *config.projector])
        self.predictor = heads.projector([features, config.predictor, features])
        self.teacher = teacher.copy_of(nn.Sequential(backbone, self.projector))

    def _predict(self, x: Images) -> Float[Tensor, "batch features"]:
        return heads.full_precision(self.predictor(self.projector(self.backbone(x))))

    @torch.no_grad()
    def _target(self, y: Images) -> Float[Tensor, "batch features"]:
        return heads.full_precision(self.teacher(y))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return distance(self._predict(x), self._target(y))

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        x, y = views
        there = distance(self._predict(x), self._target(y)).mean()
        back = distance(self._predict(y), self._target(x)).mean()
        return total(there + back, there=there, back=back)

    def after_step(self, progress: float) -> None:
        student = nn.Sequential(self.backbone, self.projector)
        teacher.follow(self.teacher, student, teacher.cosine_momentum(self.momentum, progress))


def build(config: Config, backbone: Backbone, num_samples: int) -> BYOL:
    return BYOL(config, backbone)
