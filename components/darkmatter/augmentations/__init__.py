"""What a view is. One file a policy, chosen by `augment.views.name`; views are made in batches on the device.

A policy module defines `Config` and `build(config, *, image_size) -> Views`.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field
from torch import Tensor

from darkmatter import images
from darkmatter.augmentations._draws import Draws as Draws
from darkmatter.params import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of different sizes, each in the top left corner of an equal canvas, and who they are."""

    pixels: UInt8[Tensor, "batch channels side side"]
    sizes: Int64[Tensor, "batch 2"]  # height, width
    samples: Int64[Tensor, " batch"]  # number of each sample in its split

    def to(self, device: torch.device) -> "ImageBatch":
        fields = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()}
        return ImageBatch(**fields)


def collate(contents: Sequence[bytes], samples: Int64[np.ndarray, " batch"], *, side: int) -> ImageBatch:
    """Decodes training images, none longer than `side`, into one batch."""
    arrays = [images.decode_own(content) for content in contents]
    pixels = np.zeros((len(arrays), arrays[0].shape[0], side, side), np.uint8)
    for row, array in zip(pixels, arrays, strict=True):
        row[:, : array.shape[1], : array.shape[2]] = array
    sizes = np.array([array.shape[1:] for array in arrays], np.int64)
    return ImageBatch(pixels=torch.from_numpy(pixels), sizes=torch.from_numpy(sizes), samples=torch.from_numpy(samples))


class ViewsConfig(Config):
    """What every policy has: multi-crop, M. Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 3.2."""

    local_views: int = Field(default=0, ge=0)
    """Smaller views of each image beside the whole ones, for the methods that take them; 0 for none."""
    local_scale: float = Field(default=3 / 7, gt=0, le=1)
    """Side of a smaller view relative to image_size; the paper has 96 of 224."""
    local_min_area: float = Field(default=0.05, gt=0, le=1)
    """Smallest area of its cut relative to the image; the largest is the smallest of a whole view."""


class Views(abc.ABC):
    """A policy. The randomness of a view is a function of (seed, epoch, sample, number of the view) and nothing else."""

    def __init__(self, config: ViewsConfig, image_size: int) -> None:
        self.num_local_views = config.local_views
        self._sizes = image_size, round(image_size * config.local_scale)

    def __call__(
        self, batch: ImageBatch, *, seed: int, epoch: int, whole: int = 2
    ) -> tuple[Float[Tensor, "batch channels _ _"], ...]:
        """Views of each image, pixels in [0, 1]: `whole` of full size, then the smaller ones that the policy has."""

        def view(number: int, *, local: bool) -> Tensor:
            draws = Draws.of(seed=seed, epoch=epoch, samples=batch.samples, view=number)
            return self.view(batch, draws, size=self._sizes[local], local=local)

        views = [view(number, local=False) for number in range(whole)]
        # Their numbers start at 2 however many came before, so that a method with one whole view sees the same ones.
        return (*views, *(view(2 + number, local=True) for number in range(self.num_local_views)))

    @abc.abstractmethod
    def view(
        self, batch: ImageBatch, draws: Draws, *, size: int, local: bool
    ) -> Float[Tensor, "batch channels {size} {size}"]:
        """A view of each image, `size` pixels a side, from the random numbers of `draws` alone."""
