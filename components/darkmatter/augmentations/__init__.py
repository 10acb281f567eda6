"""What a view is. One file a policy, chosen by `augment.views.name`.

A policy module defines `Config` and `build(config, *, image_size, max_side) -> Views`. Views are made in two halves:
`prepare` in the threads that read ahead, `finish` in batches on the device; a policy puts its work where it is done best.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field
from torch import Tensor

from darkmatter import images
from darkmatter.augmentations._draws import Draws as Draws
from darkmatter.params import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch between the two halves, and who is in it."""

    pixels: tuple[UInt8[Tensor, "batch channels _ _"], ...]
    sizes: Int64[Tensor, "batch 2"]  # height, width of each image
    samples: Int64[Tensor, " batch"]  # number of each sample in its split

    def to(self, device: torch.device) -> "Prepared":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Prepared":
        """In memory that a GPU can read by itself, without this process."""
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        return [*self.pixels, self.sizes, self.samples]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Prepared":
        return Prepared(pixels=tuple(map(change, self.pixels)), sizes=change(self.sizes), samples=change(self.samples))


class ViewsConfig(Config):
    """What every policy has: multi-crop, M. Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 3.2."""

    local_views: int = Field(default=0, ge=0)
    """Smaller views of each image beside the whole ones, for the methods that take them; 0 for none."""
    local_scale: float = Field(default=3 / 7, gt=0, le=1)
    """Side of a smaller view relative to image_size; the paper has 96 of 224."""
    local_min_area: float = Field(default=0.05, gt=0, le=1)
    """Smallest area of its cut relative to the image; the largest is the smallest of a whole view."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One of the views of an image: 0, 1, ... the whole ones, then, from 2 on, the smaller ones.

    The smaller ones' numbers start at 2 however many came before, so that a method with one whole view sees the same ones.
    """

    number: int
    local: bool
    size: int
    """Its side, in pixels."""


class Views(abc.ABC):
    """A policy. The randomness of a view is a function of (seed, epoch, sample, number of the view) and nothing else."""

    def __init__(self, config: ViewsConfig, image_size: int) -> None:
        self.num_local_views = config.local_views
        self._sizes = image_size, round(image_size * config.local_scale)

    def __call__(
        self, contents: Sequence[bytes], samples: Int64[np.ndarray, " batch"], *, seed: int, epoch: int, whole: int = 2
    ) -> tuple[Float[Tensor, "batch channels _ _"], ...]:
        """Both halves, here: `whole` views of full size of each image, then the smaller ones that the policy has."""
        prepared = self.prepare(contents, samples, seed=seed, epoch=epoch, whole=whole)
        return self.finish(prepared, seed=seed, epoch=epoch, whole=whole)

    def plan(self, whole: int) -> list[View]:
        """The views of each image, in their order."""
        size, small = self._sizes
        return [
            *(View(number=number, local=False, size=size) for number in range(whole)),
            *(View(number=2 + number, local=True, size=small) for number in range(self.num_local_views)),
        ]

    @abc.abstractmethod
    def prepare(
        self, contents: Sequence[bytes], samples: Int64[np.ndarray, " batch"], *, seed: int, epoch: int, whole: int
    ) -> Prepared:
        """The half that threads do, several batches at once: training images, as `augment` wrote them, to pixels."""

    @abc.abstractmethod
    def finish(
        self, prepared: Prepared, *, seed: int, epoch: int, whole: int
    ) -> tuple[Float[Tensor, "batch channels _ _"], ...]:
        """The half that the device does: a batch of pixels in [0, 1] for each view of the plan."""


def collate(contents: Sequence[bytes], samples: Int64[np.ndarray, " batch"], *, side: int) -> Prepared:
    """Decodes training images, none longer than `side`, each into the top left corner of an equal canvas."""
    arrays = [images.decode_own(content) for content in contents]
    pixels = np.zeros((len(arrays), side, side, arrays[0].shape[2]), np.uint8)
    for row, array in zip(pixels, arrays, strict=True):
        row[: array.shape[0], : array.shape[1]] = array
    sizes = np.array([array.shape[:2] for array in arrays], np.int64)
    canvas = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Prepared(pixels=(canvas,), sizes=torch.from_numpy(sizes), samples=torch.from_numpy(samples))
