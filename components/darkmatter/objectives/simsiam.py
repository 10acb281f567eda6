"""SimSiam: X. Chen, K. He, "Exploring simple siamese representation learning" (2021), https://arxiv.org/abs/2011.10566;
authors' code: facebookresearch/simsiam, `simsiam/builder.py` and `main_simsiam.py`.

Energy (inference):  F(x, y) = -cos(h(z(x)), z(y)), from prediction to projection, equation 1
Loss (training), equations 2 to 4:  mean of [F(x, y) + F(y, x)] / 2, where z of the target is a constant
Against collapse: asymmetry. No gradient goes into the target z, and only the other side has a predictor h. With a gradient
on both sides the loss falls to -1 and the energy is flat.

Family: distillation. Choose it when memory is short: neither a teacher nor negatives nor a queue.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads


class Config(_Config):
    projector: list[int] = Field(default=[2048, 2048, 2048], min_length=1)
    """Hidden and output features of the projection MLP, which ends with a batch norm; section 3, baseline settings."""
    predictor: int = Field(default=512, gt=0)
    """Hidden features of h; section 3. A quarter of the projection: a bottleneck."""


def negative_cosine(
    prediction: Float[Tensor, "batch features"], target: Float[Tensor, "batch features"]
) -> Float[Tensor, " batch"]:
    """D(p, stopgrad(z)), equations 1 and 3."""
    return -F.cosine_similarity(prediction, target.detach(), dim=1)


class SimSiam(Objective):
    against_collapse: ClassVar[Mechanism] = "asymmetric"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        features = config.projector[-1]
        self.projector = heads.projector([backbone.num_features, *config.projector], last_norm=True)
        self.predictor = heads.projector([features, config.predictor, features], last_bias=True)

    def _project(self, x: Images) -> Float[Tensor, "batch features"]:
        return self.projector(self.backbone(x))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return self._distance(self._project(x), self._project(y))

    def _distance(
        self, z: Float[Tensor, "batch features"], target: Float[Tensor, "batch features"]
    ) -> Float[Tensor, " batch"]:
        return negative_cosine(heads.full_precision(self.predictor(z)), heads.full_precision(target))

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        first, second = map(self._project, views)  # one by one, as the authors do: batch norm sees one view at a time
        there, back = self._distance(first, second).mean(), self._distance(second, first).mean()
        return total((there + back) / 2, there=there, back=back)


def build(config: Config, backbone: Backbone, num_samples: int) -> SimSiam:
    return SimSiam(config, backbone)
