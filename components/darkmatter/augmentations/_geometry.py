"""Cutting, turning and scaling: one resampling for everything."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from darkmatter.augmentations import Prepared


def affine(
    *,
    centre: tuple[Tensor, Tensor],
    extent: tuple[Tensor, Tensor],
    angle: Tensor | float = 0.0,
    shear: Tensor | float = 0.0,
) -> Float[Tensor, "batch 2 3"]:
    """The map from a view to the image, both in coordinates from -1 to 1 (x, y).

    Args:
        centre: of the cut, (x, y).
        extent: of the cut relative to the image, (x, y); a negative x mirrors.
        angle: in radians.
        shear: of x by y.
    """
    angle = torch.as_tensor(angle, device=centre[0].device).expand_as(centre[0])
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = torch.stack([extent[0] * cos, extent[0] * (shear * cos - sin), centre[0]], dim=1)
    y = torch.stack([extent[1] * sin, extent[1] * (shear * sin + cos), centre[1]], dim=1)
    return torch.stack([x, y], dim=1)


def warp(
    batch: Prepared, matrix: Float[Tensor, "batch 2 3"], size: int, *, offsets: Tensor | None = None
) -> Float[Tensor, "batch channels size size"]:
    """Samples the images at the mapped places of a size x size view; beyond its border an image repeats its edge.

    Where images are larger than the view, twice as many points are taken each way and averaged (against aliasing).

    Args:
        batch: the images, each in the top left corner of one canvas.
        matrix: from `affine`.
        size: of the view, in pixels.
        offsets: (batch, size, size, 2), added to the places, in the same coordinates; for elastic deformations.
    """
    (canvas,) = batch.pixels
    side = canvas.shape[-1]
    finer = 2 if side > size else 1
    grid = F.affine_grid(matrix, [len(matrix), 1, size * finer, size * finer], align_corners=False)
    if offsets is not None:
        grid = grid + offsets.repeat_interleave(finer, 1).repeat_interleave(finer, 2)
    extent = batch.sizes.flip(1)[:, None, None, :].to(grid.dtype)  # width, height
    place = ((grid + 1) / 2 * extent).clamp(min=0.5).minimum(extent - 0.5)  # in pixels of the canvas
    pixels = canvas.to(grid.dtype) / 255
    views = F.grid_sample(pixels, place / side * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(views, finer) if finer > 1 else views
