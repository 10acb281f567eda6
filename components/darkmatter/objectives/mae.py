"""MAE: K. He, X. Chen, S. Xie, Y. Li, P. Dollar, R. Girshick, "Masked autoencoders are scalable vision learners" (2022),
https://arxiv.org/abs/2111.06377; authors' code: facebookresearch/mae, `models_mae.py`.

Energy (inference):  F(x, y) = |hidden patches of y - decoder(encoder(visible patches of x))|^2, mean over pixels and over
a few fixed masks that together hide every patch
Loss (training), section 3:  the same with x = y, one random mask an image, pixels normalised within each patch
Against collapse: reconstruction. A constant code cannot tell what was hidden.

A vision transformer never sees the hidden patches, and the decoder is the paper's. A convolutional network sees the mean
colour there, and the decoder reads what it makes of it. The paper's views are crops and mirror images only.

Family: masked and denoising. Choose it for vision transformers, dense tasks, and data whose good views nobody knows;
it needs labels or fine-tuning to shine, nearest neighbours are not its strength.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from darkmatter.backbones import Backbone, pick
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, heads, masks


class Config(_Config):
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that is hidden; section 4.1."""
    decoder_width: int = Field(default=512, gt=0, multiple_of=4)
    """Features of the decoder's tokens; table 1b."""
    decoder_depth: int = Field(default=8, gt=0)
    """Its transformer blocks, table 1a; 3x3 convolutions behind a convolutional network."""
    decoder_heads: int = Field(default=16, gt=0)
    """Its attention heads; none behind a convolutional network."""
    normalise_pixels: bool = True
    """Each patch of the target to mean 0 and variance 1; table 1d."""


def normalise(patches: Float[Tensor, "batch patches pixels"]) -> Float[Tensor, "batch patches pixels"]:
    """Each patch to mean 0 and variance 1; the 1e-6 is the authors'."""
    return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def reconstruction(
    predicted: Float[Tensor, "batch hidden pixels"], target: Float[Tensor, "batch hidden pixels"]
) -> Float[Tensor, " batch"]:
    """Mean squared error over the hidden patches of each image."""
    return (predicted - target).square().mean((1, 2))


class MAE(Objective):
    against_collapse: ClassVar[Mechanism] = "reconstruction"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        decoders.need_patches(backbone, 4, method="mae")
        backbone.freeze_head()
        self.config = config
        patches = backbone.grid**2
        self.num_hidden = min(patches - 1, max(1, round(config.mask_ratio * patches)))
        self.decoder = decoders.HiddenPatches(
            backbone,
            backbone.channels * (backbone.image_size // backbone.grid) ** 2,
            width=config.decoder_width,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
        )

    def _error(self, x: Images, y: Images, order: Int64[Tensor, "batch patches"]) -> Float[Tensor, " batch"]:
        """How far the hidden patches of y, the tail of `order`, are from what the visible ones of x let expect."""
        visible, hidden = order[:, : -self.num_hidden], order[:, -self.num_hidden :]
        (predicted,) = self.decoder(self.backbone, x, visible, hidden)
        target = decoders.patchify(self.backbone.normalise(y), self.backbone.grid)
        target = pick(target, hidden)
        return reconstruction(
            heads.full_precision(predicted), normalise(target) if self.config.normalise_pixels else target
        )

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        orders = masks.fixed_orders(self.backbone.grid**2, self.num_hidden, x.device)
        return torch.stack([self._error(x, y, order.expand(len(x), -1)) for order in orders]).mean(0)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,) = views
        loss = self._error(x, x, masks.random_order(len(x), self.backbone.grid**2, x.device)).mean()
        return total(loss, reconstruction=loss)


def build(config: Config, backbone: Backbone, num_samples: int) -> MAE:
    return MAE(config, backbone)
