"""What a view is. One file a policy, chosen by `augment.views.name`; views are made in batches on the device.

A policy module defines `Config` and `build(config, *, image_size) -> Views`.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from darkmatter import images
from darkmatter.augmentations._draws import Draws as Draws


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


class Views(abc.ABC):
    """A policy. The randomness of a view is a function of (seed, epoch, sample, number of the view) and nothing else."""

    num_views: int

    def __call__(
        self, batch: ImageBatch, *, seed: int, epoch: int
    ) -> tuple[Float[Tensor, "batch channels size size"], ...]:
        """`num_views` views of each image, pixels in [0, 1]."""
        return tuple(
            self.view(batch, Draws.of(seed=seed, epoch=epoch, samples=batch.samples, view=view), view)
            for view in range(self.num_views)
        )

    @abc.abstractmethod
    def view(self, batch: ImageBatch, draws: Draws, number: int) -> Float[Tensor, "batch channels size size"]:
        """View `number` of each image, from the random numbers of `draws` alone."""
