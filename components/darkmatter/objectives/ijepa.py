"""I-JEPA: M. Assran et al., "Self-supervised learning from images with a joint-embedding predictive architecture" (2023),
https://arxiv.org/abs/2301.08243; authors' code: facebookresearch/ijepa, `src/train.py` and `src/masks/multiblock.py`.

Energy (inference):  F(x, y) = distance of what the context of x lets expect of the targets' features of y, from what the
teacher makes of all of y there: smooth L1, mean over the targets of a few fixed masks
Loss (training):  F(x, x) with masks that are drawn: four rectangles are the targets, a large square without them the context
Against collapse: asymmetry. The teacher is an average of past students that no gradient reaches, and only the student has a
predictor. With a teacher that is trained itself all features become the same.

One view: nothing but the mask is to be predicted. The distance is the authors' code's, smooth L1 between the prediction and
the layer-normed feature; the paper says squared L2. A vision transformer leaves out what is hidden of the context and
predicts each target on its own; a convolutional network sees the mean colour there, and convolutions predict.
The teacher is what the paper evaluates.

Family: joint-embedding predictive. Choose it for vision transformers and dense tasks, without hand-made views and without
predicting pixels.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from darkmatter.backbones import Backbone, pick
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, heads, masks, teacher

_FIXED_MASKS = 4  # of the energy, with four targets each


class Config(_Config):
    predictor_width: int = Field(default=384, gt=0, multiple_of=4)
    """Features of the predictor's tokens; appendix A.1."""
    predictor_depth: int = Field(default=12, gt=0)
    """Its transformer blocks, appendix A.1: 6 behind a ViT-B; 3x3 convolutions behind a convolutional network."""
    predictor_heads: int = Field(default=12, gt=0)
    """Its attention heads, as many as the encoder's; none behind a convolutional network."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; it rises to 1 linearly. Appendix A.1. Short runs want less: 0.99 and below."""


def distance(
    prediction: Float[Tensor, "targets batch block features"], target: Float[Tensor, "targets batch block features"]
) -> Float[Tensor, " batch"]:
    """Smooth L1: half the square where the difference is below 1, else its size less a half."""
    return F.smooth_l1_loss(prediction, target, reduction="none").mean((0, 2, 3))


class IJEPA(Objective):
    against_collapse: ClassVar[Mechanism] = "asymmetric"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        decoders.need_patches(backbone, 9, method="ijepa")
        super().__init__(teacher.copy_of(backbone))
        backbone.freeze_head()
        self.student = backbone
        self.predictor = decoders.HiddenPatches(
            backbone,
            backbone.token_features,
            width=config.predictor_width,
            depth=config.predictor_depth,
            heads=config.predictor_heads,
        )
        self.momentum = config.momentum

    def _predict(
        self, x: Images, context: Int64[Tensor, "batch context"], targets: Int64[Tensor, "targets batch block"]
    ) -> Float[Tensor, "targets batch block features"]:
        predictions = self.predictor(self.student, x, context, *targets)
        return heads.full_precision(torch.stack(predictions))

    @torch.no_grad()
    def _features(self, y: Images) -> Float[Tensor, "batch patches features"]:
        features = heads.full_precision(self.backbone.patches(y))
        return F.layer_norm(features, features.shape[-1:])

    def _error(
        self,
        x: Images,
        features: Float[Tensor, "batch patches features"],
        context: Int64[Tensor, "batch context"],
        targets: Int64[Tensor, "targets batch block"],
    ) -> Float[Tensor, " batch"]:
        return distance(self._predict(x, context, targets), torch.stack([pick(features, places) for places in targets]))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        features, batch = self._features(y), len(x)
        context, targets = masks.fixed_multi_blocks(_FIXED_MASKS, self.student.grid, x.device)
        errors = [
            self._error(x, features, context[index].expand(batch, -1), targets[:, index, None].expand(-1, batch, -1))
            for index in range(_FIXED_MASKS)
        ]
        return torch.stack(errors).mean(0)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,) = views
        loss = self._error(x, self._features(x), *masks.multi_block(len(x), self.student.grid, x.device)).mean()
        return total(loss, prediction=loss)

    def after_step(self, progress: float) -> None:
        teacher.follow(self.backbone, self.student, self.momentum + (1 - self.momentum) * progress)


def build(config: Config, backbone: Backbone, num_samples: int) -> IJEPA:
    return IJEPA(config, backbone)
