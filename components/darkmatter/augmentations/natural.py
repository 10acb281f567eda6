"""Views of photographs and drawings: the policy of SimCLR (appendix A of https://arxiv.org/abs/2002.05709).

Random resized crop, mirror, colour jitter, grey, blur. Colours are changed by one matrix a view, in the order brightness,
contrast, saturation, hue; hue turns in the YIQ plane, which is cheaper than HSV and not the same.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from darkmatter.augmentations import Draws, ImageBatch, Views, ViewsConfig
from darkmatter.augmentations._geometry import affine, warp

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class Config(ViewsConfig):
    min_area: float = Field(default=0.2, gt=0, le=1)
    """Smallest area of the crop relative to the image. The paper has 0.08 for ImageNet."""
    jitter: float = Field(default=0.5, ge=0, le=1)
    """Strength s of the colour jitter: 0.8 s on brightness, contrast and saturation, 0.2 s on hue (turns)."""
    jitter_probability: float = Field(default=0.8, ge=0, le=1)
    """Of any change of colour."""
    grey_probability: float = Field(default=0.2, ge=0, le=1)
    """Of losing all colour."""
    blur_probability: float = Field(default=0.5, ge=0, le=1)
    """Of a Gaussian blur with sigma from 0.1 to 2 pixels at 224, in proportion at other sizes."""


class Natural(Views):
    def __init__(self, config: Config, image_size: int) -> None:
        super().__init__(config, image_size)
        self.config = config

    def view(
        self, batch: ImageBatch, draws: Draws, *, size: int, local: bool
    ) -> Float[Tensor, "batch channels {size} {size}"]:
        views = warp(batch, self._crop(batch, draws, local=local), size)
        if views.shape[1] == 3:
            views = self._colour(views, draws)
        return self._blur(views, draws).clamp(0, 1)

    def _crop(self, batch: ImageBatch, draws: Draws, *, local: bool) -> Float[Tensor, "batch 2 3"]:
        height, width = batch.sizes.to(torch.float32).unbind(1)
        areas = (self.config.local_min_area, self.config.min_area) if local else (self.config.min_area, 1)
        area = draws.uniform(*areas) * height * width
        aspect = torch.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide = (area * aspect).sqrt().minimum(width) / width
        high = (area / aspect).sqrt().minimum(height) / height
        x, y = draws.uniform(-1, 1) * (1 - wide), draws.uniform(-1, 1) * (1 - high)
        mirror = torch.where(draws.chance(0.5), -1.0, 1.0)
        return affine(centre=(x, y), extent=(wide * mirror, high))

    def _colour(self, views: Tensor, draws: Draws) -> Tensor:
        strength, identity = self.config.jitter, torch.eye(3, device=views.device)
        grey = torch.tensor(_GREY, device=views.device).expand(3, 3)
        yiq = torch.tensor(_YIQ, device=views.device)
        brightness, contrast, saturation = (draws.uniform(1 - 0.8 * strength, 1 + 0.8 * strength) for _ in range(3))
        turn = draws.uniform(-0.2 * strength, 0.2 * strength) * 2 * math.pi
        cos, sin, one, zero = torch.cos(turn), torch.sin(turn), torch.ones_like(turn), torch.zeros_like(turn)
        rows = ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))
        rotation = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (B, 3, 3) in YIQ
        hue = yiq.inverse() @ rotation @ yiq
        saturate = saturation[:, None, None] * identity + (1 - saturation)[:, None, None] * grey
        jitter = draws.chance(self.config.jitter_probability)[:, None, None]
        gain = torch.where(jitter, (contrast * brightness)[:, None, None], 1.0)
        matrix = torch.where(jitter, hue @ saturate, identity)
        matrix = torch.where(draws.chance(self.config.grey_probability)[:, None, None], grey @ matrix, matrix)
        mean = (views * torch.tensor(_GREY, device=views.device)[:, None, None]).sum(1).mean((1, 2))
        lift = torch.where(jitter[:, 0, 0], (1 - contrast) * brightness * mean, 0.0)  # contrast keeps the mean grey
        changed = torch.einsum("bij,bjhw->bihw", matrix * gain, views)
        return (changed + lift[:, None, None, None]).clamp(0, 1)

    def _blur(self, views: Tensor, draws: Draws) -> Tensor:
        batch, channels, size, _ = views.shape
        sigma = draws.uniform(0.1, 2.0) * size / 224
        sigma = torch.where(draws.chance(self.config.blur_probability), sigma, 1e-3)
        radius = max(1, math.ceil(2 * 2.0 * size / 224))
        places = torch.arange(-radius, radius + 1, device=views.device)
        kernel = torch.exp(-places.square() / (2 * sigma[:, None].square()))
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (B C, 2 radius + 1)
        flat = F.pad(views.reshape(1, batch * channels, size, size), (radius,) * 4, mode="reflect")
        flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
        flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
        return flat.view(batch, channels, size, size)


def build(config: Config, *, image_size: int) -> Natural:
    return Natural(config, image_size)
