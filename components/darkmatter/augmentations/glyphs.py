"""Views of centred shapes on a plain ground (characters, symbols, stamps): moved, turned, sheared, bent, never mirrored.

Crops decide here: SimCLR on 28-pixel digits with crops from 0.4 of the area fell below raw pixels, with crops from 0.64
it was above them (measured, DECISIONS.md).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from darkmatter.augmentations import Draws, Prepared, Views, ViewsConfig, collate
from darkmatter.augmentations._geometry import affine, warp


class Config(ViewsConfig):
    min_area: float = Field(default=0.64, gt=0, le=1)
    """Smallest area of the cut, relative to the image; the largest is its inverse (the shape shrinks)."""
    max_shift: float = Field(default=0.2, ge=0)
    """Largest shift, relative to half the image."""
    max_degrees: float = Field(default=14.0, ge=0)
    """Largest rotation."""
    max_shear: float = Field(default=0.3, ge=0)
    """Largest shift of the upper edge against the lower, relative to the height."""
    bend: float = Field(default=0.1, ge=0)
    """Strength of a smooth random deformation, relative to half the image."""
    min_contrast: float = Field(default=0.6, gt=0, le=1)
    """Smallest factor on the contrast."""


class Glyphs(Views):
    def __init__(self, config: Config, image_size: int, max_side: int) -> None:
        super().__init__(config, image_size)
        self.config, self._max_side = config, max_side

    def prepare(
        self, contents: Sequence[bytes], samples: Int64[np.ndarray, " batch"], *, seed: int, epoch: int, whole: int
    ) -> Prepared:
        return collate(contents, samples, side=self._max_side)

    def finish(
        self, prepared: Prepared, *, seed: int, epoch: int, whole: int
    ) -> tuple[Float[Tensor, "batch channels _ _"], ...]:
        return tuple(
            self._view(
                prepared,
                Draws.of(seed=seed, epoch=epoch, samples=prepared.samples, view=view.number),
                size=view.size,
                local=view.local,
            )
            for view in self.plan(whole)
        )

    def _view(
        self, batch: Prepared, draws: Draws, *, size: int, local: bool
    ) -> Float[Tensor, "batch channels {size} {size}"]:
        config = self.config
        spread = -math.log(config.min_area) / 2  # of the logarithm of a length
        smallest, largest = (math.log(config.local_min_area) / 2, -spread) if local else (-spread, spread)
        zoom = torch.exp(draws.uniform(smallest, largest))
        aspect = torch.exp(draws.uniform(-spread / 2, spread / 2))
        room = config.max_shift + (1 - zoom if local else 0.0)  # a smaller cut may lie anywhere in the image
        matrix = affine(
            centre=(draws.uniform(-1, 1) * room, draws.uniform(-1, 1) * room),
            extent=(zoom * aspect, zoom / aspect),
            angle=draws.uniform(-1, 1) * math.radians(config.max_degrees),
            shear=draws.uniform(-1, 1) * config.max_shear,
        )
        views = warp(batch, matrix, size, offsets=self._bend(draws, size))
        contrast = draws.uniform(config.min_contrast, 1)[:, None, None, None]
        return views * contrast + (1 - contrast) * views.mean((2, 3), keepdim=True)

    def _bend(self, draws: Draws, size: int) -> Tensor | None:
        if not self.config.bend:
            return None
        coarse = torch.stack([draws.uniform(-1, 1) for _ in range(2 * 4 * 4)], dim=1).view(-1, 2, 4, 4)
        smooth = F.interpolate(coarse, size, mode="bicubic", align_corners=True)
        return smooth.permute(0, 2, 3, 1) * self.config.bend  # (B, S, S, 2)


def build(config: Config, *, image_size: int, max_side: int) -> Glyphs:
    return Glyphs(config, image_size, max_side)
