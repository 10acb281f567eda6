"""Denoising autoencoder: P. Vincent, H. Larochelle, Y. Bengio, P.-A. Manzagol, "Extracting and composing robust features
with denoising autoencoders" (2008), https://www.jmlr.org/papers/v11/vincent10a.html (the journal version); authors' code:
lisa-lab/DeepLearningTutorials, `code/dA.py`, of their laboratory.

Energy (inference):  F(x, y) = cross-entropy of y and decoder(encoder(x)), less the entropy of y: x is the damaged y
Loss (training), section 2.3:  cross-entropy of y and decoder(encoder(y with a share of its pixels set to 0)), summed
Against collapse: reconstruction. A constant code cannot tell what was destroyed.

Family: masked and denoising. Choose it as a baseline that always trains, and for data whose good views nobody knows;
strong on digits, whose pixels say most of it.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, heads


class Config(_Config):
    destroyed: float = Field(default=0.25, ge=0, lt=1)
    """nu: the share of the pixels of each image that is set to 0, in all channels; section 4 tries up to 0.4."""
    decoder_width: int = Field(default=32, gt=0)
    """Channels of the decoder at full size; it starts with up to four times as many."""


def destroy(images: Images, share: float) -> Images:
    """The same number of pixels in each image, chosen at random, set to 0."""
    batch, _, height, width = images.shape
    order = collectives.draw(lambda size: torch.rand(size, height * width, device=images.device), batch).argsort(1)
    kept = order >= round(share * height * width)  # the rank of a pixel in a random order
    return images * kept.view(batch, 1, height, width)


class Denoising(Objective):
    against_collapse: ClassVar[Mechanism] = "reconstruction"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.destroyed = config.destroyed
        self.decoder = decoders.ImageDecoder(
            backbone.num_features,
            channels=backbone.channels,
            image_size=backbone.image_size,
            width=config.decoder_width,
        )

    def _reconstruct(self, x: Images) -> Float[Tensor, "batch channels size size"]:
        return heads.full_precision(self.decoder(self.backbone(x)))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return decoders.deviance(self._reconstruct(x), y)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (y,) = views
        loss = decoders.cross_entropy(self._reconstruct(destroy(y, self.destroyed)), y).mean()
        return total(loss, cross_entropy=loss)


def build(config: Config, backbone: Backbone, num_samples: int) -> Denoising:
    return Denoising(config, backbone)
