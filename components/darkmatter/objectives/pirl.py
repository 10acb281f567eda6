"""PIRL: I. Misra, L. van der Maaten, "Self-supervised learning of pretext-invariant representations" (2019),
https://arxiv.org/abs/1912.01991; authors' code: facebookresearch/vissl, `vissl/losses/nce_loss.py` and
`configs/config/pretrain/pirl/pirl_jigsaw_4node_resnet50.yaml`.

Energy (inference):  F(x, y) = -[lambda cos(f(x), g(t(y))) + (1 - lambda) cos(f(x), f(y))] / temperature, the two scores of
    the loss with f(x) in the place of what the bank remembers, and t the patches in raster order
Loss (training), equation 5, m_I what a bank remembers of f for the image I:
    lambda L(m_I, g(t(I))) + (1 - lambda) L(m_I, f(I)),  t the patches of I in a random order, drawn anew each time
Against collapse: features of other samples, remembered in the bank, are pushed to a higher energy. One view is enough.

L is noise-contrastive estimation with m of the n samples, as in the authors' code: -log h(own) - sum of log(1 - h(noise)),
h = P / (P + m / n), P = exp(score) / Z, Z from the scores of the jigsaw in the first batch; equation 3 has the sum over the
noise in place of Z. Their epsilon in the denominators of h is left out. Here both terms meet the same noise, and the
patches come from the same view as the image; there each term draws its own noise and its own crop.

Family: contrastive. Choose it when the arrangement of parts matters more than colour or texture, for tens of visits to
each sample and more.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.params import ParamsError
from darkmatter.parts import heads, masks, noise_contrast


class Config(_Config):
    grid: int = Field(default=3, ge=2)
    """Patches along each side of the jigsaw; section 3.2. Pixels that it does not divide are cut off."""
    features: int = Field(default=128, gt=0)
    """Output features of both heads, and of each row of the bank; section 3.2."""
    jigsaw: float = Field(default=0.5, ge=0, le=1)
    """lambda of equation 5; section 3.2."""
    temperature: float = Field(default=0.07, gt=0)
    """Section 3.2."""
    negatives: int = Field(default=32000, gt=0)
    """m, drawn from the bank for each image; section 3.2."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Of a row of the bank when its sample is seen; section 3.2. Runs of tens of short epochs want more, up to 0.99."""


def cut(images: Images, grid: int) -> Float[Tensor, "patches channels side side"]:
    """grid x grid patches of each image, in raster order, one image after the other."""
    side = images.shape[-1] // grid
    images = images[:, :, : side * grid, : side * grid]
    return images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


class PIRL(Objective):
    against_collapse: ClassVar[Mechanism] = "contrastive"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone, num_samples: int) -> None:
        super().__init__(backbone)
        self.config = config
        self.image_head = nn.Linear(backbone.num_features, config.features)
        self.patch_head = nn.Linear(backbone.num_features, config.features)
        self.jigsaw_head = nn.Linear(config.grid**2 * config.features, config.features)
        self.memory = noise_contrast.Discrimination(num_samples, config.features)

    def _image(self, x: Images) -> Float[Tensor, "batch features"]:
        """f(x)"""
        return F.normalize(heads.full_precision(self.image_head(self.backbone(x))), dim=1)

    def _jigsaw(self, x: Images, order: Int64[Tensor, "batch patches"]) -> Float[Tensor, "batch features"]:
        """g(t(x)). A patch goes through the backbone by itself, so the order may as well be that of its features."""
        patches = self.patch_head(self.backbone(cut(x, self.config.grid))).unflatten(0, order.shape)
        shuffled = patches.gather(1, order[:, :, None].expand_as(patches)).flatten(1)
        return F.normalize(heads.full_precision(self.jigsaw_head(shuffled)), dim=1)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        order = torch.arange(self.config.grid**2, device=y.device).expand(len(y), -1)
        weight = self.config.jigsaw
        newest = weight * self._jigsaw(y, order) + (1 - weight) * self._image(y)
        return -(self._image(x) * newest).sum(1) / self.config.temperature

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,), config = views, self.config
        image, jigsaw = self._image(x), self._jigsaw(x, masks.random_order(len(x), config.grid**2, x.device))
        of_jigsaw, of_image = self.memory.losses([jigsaw, image], samples, config.negatives, config.temperature)
        self.memory.see(samples, image)
        weighted = config.jigsaw * of_jigsaw + (1 - config.jigsaw) * of_image
        return total(weighted, jigsaw=of_jigsaw, image=of_image)

    def after_step(self, progress: float) -> None:
        self.memory.follow(self.config.momentum)


def build(config: Config, backbone: Backbone, num_samples: int) -> PIRL:
    if backbone.image_size < config.grid:
        raise ParamsError(f"objective.pirl.grid: {config.grid} x {config.grid} patches of {backbone.image_size} pixels")
    return PIRL(config, backbone, num_samples)
