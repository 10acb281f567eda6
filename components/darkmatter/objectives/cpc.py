"""CPC: A. van den Oord, Y. Li, O. Vinyals, "Representation learning with contrastive predictive coding" (2018),
https://arxiv.org/abs/1807.03748, as in O. Henaff et al., "Data-efficient image recognition with contrastive predictive
coding" (2019), https://arxiv.org/abs/1905.09272; authors' code: there is no repository, its appendix A.2 prints the loss.

Energy (inference):  F(x, y) = mean over places and steps of -log P(patch of y | prediction from x), P the softmax of
prediction . target over the patches of y alone: do the rows seen of x say which patch of y is where?
Loss (training), equation 5 (InfoNCE):  for each step the mean over places of
    -log( exp(prediction . target of the patch) / sum over all patches of the batch of exp(prediction . target) )
Against collapse: every other patch, of this image and of others, is pushed to a higher energy.

An image is a grid of overlapping patches, each through the backbone by itself. A context, which sees the rows down to its
own, predicts patches further down. What downstream teams get is the backbone on whole images. The bare product
-prediction . target is no good energy, since nothing fixes its zero for an image: on the digits its margin falls from 0.93
to 0.71 in training, while that of the energy above stays at 0.92 (DECISIONS.md).

Family: contrastive. Choose it when the data is a sequence or a grid and order carries the meaning; costly on images.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.params import ParamsError
from darkmatter.parts import heads

_SCALE = 0.1  # of the predictions, `emb_scale` in the authors' code


class Config(_Config):
    patches: int = Field(default=7, ge=3)
    """Along each side; they overlap by half. 2018, section 3.3."""
    ignore: int = Field(default=2, ge=0)
    """Rows below the context that are not asked for, since they overlap with it or nearly; `steps_to_ignore`."""
    steps: int = Field(default=1, gt=0)
    """Rows asked for after those; `steps_to_predict` less `steps_to_ignore`."""
    features: int = Field(default=64, gt=0)
    """Of targets and predictions; `target_dim`."""
    context_width: int = Field(default=256, gt=0)
    """Channels inside the blocks of the context network."""
    context_depth: int = Field(default=5, gt=0)
    """Its residual blocks."""


class _Below(nn.Sequential):
    """A residual block that looks at its own row and the one above."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(features, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, (1, 3), padding=(0, 1)),
            nn.ZeroPad2d((0, 0, 1, 0)),
            nn.Conv2d(width, width, (2, 1)),
            nn.ReLU(),
            nn.Conv2d(width, features, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@heads.exact
def info_nce(
    predictions: Float[Tensor, "batch rows columns features"],
    targets: Float[Tensor, "batch all_rows columns features"],
) -> Float[Tensor, ""]:
    """Predictions, which belong to the last rows of `targets`, against all patches of the global batch."""
    rows = predictions.shape[1]
    logits = predictions.flatten(0, 2) @ collectives.gather(targets).flatten(0, 2).T
    places = torch.arange(targets[..., 0].numel(), device=targets.device).view(targets.shape[:3])
    own = places[:, -rows:] + collectives.rank() * places.numel()
    return F.cross_entropy(logits, own.flatten())


@heads.exact
def surprise(
    predictions: Float[Tensor, "batch rows columns features"],
    targets: Float[Tensor, "batch all_rows columns features"],
) -> Float[Tensor, " batch"]:
    """The same for each image by itself: predictions against the patches of that image alone."""
    rows = predictions.shape[1]
    logits = predictions.flatten(1, 2) @ targets.flatten(1, 2).transpose(1, 2)  # (B, places, patches)
    places = torch.arange(targets[0, ..., 0].numel(), device=targets.device).view(targets.shape[1:3])
    own = places[-rows:].flatten().expand(len(logits), -1)
    return F.cross_entropy(logits.transpose(1, 2), own, reduction="none").mean(1)


class CPC(Objective):
    against_collapse: ClassVar[Mechanism] = "contrastive"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.patches = config.patches
        self.side = 2 * backbone.image_size // (config.patches + 1)
        self.ahead = range(config.ignore + 1, config.ignore + config.steps + 1)
        if self.side < 2 or self.ahead[-1] >= config.patches:
            raise ParamsError(
                f"objective.cpc: {config.patches} patches a side of an image of {backbone.image_size} pixels cannot be "
                f"predicted {self.ahead[-1]} rows ahead; ignore + steps must be below patches, patches below the pixels"
            )
        width = backbone.num_features
        blocks = (_Below(width, config.context_width) for _ in range(config.context_depth))
        self.context = nn.Sequential(*blocks, nn.ReLU())
        self.target = nn.Conv2d(width, config.features, 1)
        self.predictions = nn.ModuleList(nn.Conv2d(width, config.features, 1) for _ in self.ahead)

    def _encode(self, x: Images) -> Float[Tensor, "batch features rows columns"]:
        side, step, count = self.side, self.side // 2, self.patches
        cut = x.unfold(2, side, step)[:, :, :count].unfold(3, side, step)[:, :, :, :count]
        features = self.backbone(cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
        return features.view(len(x), count, count, -1).permute(0, 3, 1, 2)

    def _targets(self, z: Float[Tensor, "batch features rows columns"]) -> Float[Tensor, "batch rows columns out"]:
        return heads.full_precision(self.target(z)).permute(0, 2, 3, 1)

    def _predict(self, z: Float[Tensor, "batch features rows columns"]) -> list[Float[Tensor, "batch _ columns out"]]:
        """For each step: what is expected that many rows below, for all rows that have such a one."""
        context = self.context(z)
        pairs = zip(self.predictions, self.ahead, strict=True)
        return [heads.full_precision(p(context)).permute(0, 2, 3, 1)[:, :-k] * _SCALE for p, k in pairs]

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        targets = self._targets(self._encode(y))
        return torch.stack([surprise(prediction, targets) for prediction in self._predict(self._encode(x))]).mean(0)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,) = views
        z = self._encode(x)
        targets = self._targets(z)
        by_step = [info_nce(prediction, targets) for prediction in self._predict(z)]
        loss = torch.stack(by_step).sum()
        return total(loss, **{f"info_nce_{k}": term for k, term in zip(self.ahead, by_step, strict=True)})


def build(config: Config, backbone: Backbone, num_samples: int) -> CPC:
    return CPC(config, backbone)
