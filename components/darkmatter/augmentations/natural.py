"""Views of photographs and drawings: random resized crop, mirror, colour jitter, grey, blur, solarize.

The policy of SimCLR (appendix A of https://arxiv.org/abs/2002.05709) by default; BYOL's and DINO's by their options. What is
drawn has torchvision's distributions; `engine` says how the pixels are computed, and where.
"""

import collections
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from pydantic import Field
from torch import Tensor

from darkmatter import images
from darkmatter.augmentations import Draws, Prepared, View, Views, ViewsConfig, _cpu
from darkmatter.augmentations._colour import Colours, Maps

_RATIOS = 3 / 4, 4 / 3  # of width to height
_TRIES = 10

Probability = Annotated[float, Field(ge=0, le=1)]


class Config(ViewsConfig):
    engine: Literal["exact", "fast", "device"] = "exact"
    """exact: torchvision's arithmetic, on the CPU. fast: on the CPU; resizes through a mip map and folds the colour jitter
    into one matrix, with hue in YIQ. device: as fast, but the device does colour and blur, in batches."""
    min_area: float = Field(default=0.2, gt=0, le=1)
    """Smallest area of the crop relative to the image. The paper has 0.08 for ImageNet."""
    jitter: list[Annotated[float, Field(ge=0)]] = Field(default=[0.4, 0.4, 0.4, 0.1], min_length=4, max_length=4)
    """Of brightness, contrast, saturation and hue (turns), as in torchvision's ColorJitter, in an order that is drawn."""
    jitter_probability: Probability = 0.8
    """Of any change of colour."""
    grey_probability: Probability = 0.2
    """Of losing all colour."""
    blur_probability: list[Probability] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)
    """Of a Gaussian blur: of the first whole view, of the others, of the smaller ones. DINO has 1.0, 0.1, 0.5."""
    blur_sigma: list[Annotated[float, Field(gt=0)]] = Field(default=[0.1, 2.0], min_length=2, max_length=2)
    """Its smallest and largest width in pixels where image_size is 224; in proportion for others."""
    solarize_probability: list[Probability] = Field(default=[0.0, 0.0, 0.0], min_length=3, max_length=3)
    """Of inverting bright pixels, likewise. DINO and BYOL have 0.0, 0.2, 0.0."""


class Natural(Views):
    def __init__(self, config: Config, image_size: int) -> None:
        super().__init__(config, image_size)
        self.config = config
        self._sigma = [sigma * image_size / 224 for sigma in config.blur_sigma]
        cv2.setNumThreads(0)  # a thread has one image; OpenCV's own would only get in each other's way

    def prepare(
        self, contents: Sequence[bytes], samples: Int64[np.ndarray, " batch"], *, seed: int, epoch: int, whole: int
    ) -> Prepared:
        plan, batch = self.plan(whole), len(contents)
        drawn = _Drawn(self, plan, seed, epoch, torch.from_numpy(samples))
        done, sizes = [], np.empty((batch, 2), np.int64)
        for index, content in enumerate(contents):
            pixels = images.decode_own(content)
            sizes[index] = pixels.shape[:2]
            if not index:
                done = _rooms(plan, batch, channels=pixels.shape[2])
            for number, out in enumerate(done):
                drawn.view(pixels, number * batch + index, out[index])
        return Prepared(
            pixels=tuple(torch.from_numpy(out).permute(0, 3, 1, 2) for out in done),
            sizes=torch.from_numpy(sizes),
            samples=torch.from_numpy(samples),
        )

    def finish(
        self, prepared: Prepared, *, seed: int, epoch: int, whole: int
    ) -> tuple[Float[Tensor, "batch channels _ _"], ...]:
        views = [pixels.float() / 255 for pixels in prepared.pixels]
        if self.config.engine != "device":
            return tuple(views)
        effects = _Effects(self, self.plan(whole), seed, epoch, prepared.samples)
        each = (one.split(len(prepared.samples)) for one in (effects.colours.maps(), effects.sigma, effects.solarized))
        return tuple(self._on_device(*one) for one in zip(views, *each, strict=True))

    def _on_device(
        self,
        pixels: Float[Tensor, "batch channels _ _"],
        maps: Maps,
        sigma: Float[Tensor, " batch"],
        solarized: Bool[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels _ _"]:
        mean = pixels.mean((2, 3))
        a, b = maps.split(3, dim=2)
        if pixels.shape[1] == 1:
            a, b = _of_grey(a), _of_grey(b)
        lift = torch.einsum("bij,bj->bi", b, mean)
        pixels = (torch.einsum("bij,bjhw->bihw", a, pixels) + lift[:, :, None, None]).clamp(0, 1)
        pixels = _blur(pixels, sigma, radius=math.ceil(3 * self._sigma[1])).clamp(0, 1)
        return torch.where(solarized[:, None, None, None], torch.minimum(pixels, 1 - pixels), pixels)


class _Effects:
    """What is drawn for the views of the images of a batch, but for the cuts: a row for each image of the first view, then
    of the second, and so on."""

    def __init__(
        self, policy: Natural, plan: Sequence[View], seed: int, epoch: int, samples: Int64[Tensor, " batch"]
    ) -> None:
        config, batch, device = policy.config, len(samples), samples.device

        def rows(*of_views: float) -> Tensor:
            return torch.tensor(of_views, device=device).repeat_interleave(batch)

        kinds = [2 if view.local else min(view.number, 1) for view in plan]
        numbers = rows(*(view.number for view in plan))
        draws = Draws.of(seed=seed, epoch=epoch, samples=samples.repeat(len(plan)), view=numbers)
        self.colours = Colours.draw(
            draws,
            config.jitter,
            jitter_probability=config.jitter_probability,
            grey_probability=config.grey_probability,
        )
        sigma = draws.uniform(*policy._sigma)
        self.sigma = torch.where(draws.chance(rows(*(config.blur_probability[kind] for kind in kinds))), sigma, 0.0)
        self.solarized = draws.chance(rows(*(config.solarize_probability[kind] for kind in kinds)))
        self.draws, self.rows = draws, rows


class _Drawn:
    """The same and the cuts, as plain numbers, for a loop over the images."""

    def __init__(
        self, policy: Natural, plan: Sequence[View], seed: int, epoch: int, samples: Int64[Tensor, " batch"]
    ) -> None:
        config, self.engine = policy.config, policy.config.engine
        effects = _Effects(policy, plan, seed, epoch, samples)
        areas = [(config.local_min_area, config.min_area) if view.local else (config.min_area, 1.0) for view in plan]
        self.tries = _tries(effects.draws, *(effects.rows(*bounds) for bounds in zip(*areas, strict=True)))
        self.corners = effects.draws.units(2).tolist()
        self.mirrored = effects.draws.chance(0.5).tolist()
        if self.engine == "device":
            return
        colours = effects.colours
        self.sigma, self.solarized = effects.sigma.tolist(), effects.solarized.tolist()
        self.jittered, self.grey = colours.jittered.tolist(), colours.grey.tolist()
        if self.engine == "fast":
            self.maps = [colours.maps().numpy()]
            return
        places, hue = torch.arange(4), colours.place_of_hue
        before, after = places < hue[:, None], places > hue[:, None]
        self.maps = [colours.maps(before, grey=False).numpy(), colours.maps(after).numpy()]
        self.place_of_hue, self.turns = hue.tolist(), colours.factors[:, 3].tolist()

    def view(self, image: _cpu.Pixels, row: int, out: _cpu.Pixels) -> None:
        """Of an image to `out`."""
        top, left, height, width = box(image.shape[0], image.shape[1], self.tries[row], self.corners[row])
        resize = _cpu.resize_exact if self.engine == "exact" else _cpu.resize_fast
        resize(image[top : top + height, left : left + width], out)
        if self.mirrored[row]:
            _cpu.mirror(out)
        if self.engine == "device":
            return
        if self.jittered[row] or self.grey[row]:
            self._colour(out, row)
        if self.sigma[row] > 0:
            _cpu.blur(out, self.sigma[row])
        if self.solarized[row]:
            _cpu.solarize(out)

    def _colour(self, pixels: _cpu.Pixels, row: int) -> None:
        if pixels.shape[2] == 1:
            for maps in self.maps:
                _cpu.map_grey(pixels, maps[row])
            return
        if self.engine == "fast":
            _cpu.map_colour(pixels, self.maps[0][row])
            return
        if self.jittered[row]:
            if self.place_of_hue[row] > 0:
                _cpu.map_colour(pixels, self.maps[0][row])
            _cpu.turn_hue(pixels, self.turns[row])
        if self.grey[row] or self.place_of_hue[row] < 3:
            _cpu.map_colour(pixels, self.maps[1][row])


def _rooms(plan: Sequence[View], batch: int, *, channels: int) -> list[UInt8[np.ndarray, "{batch} _ _ {channels}"]]:
    """For the pixels of each view. Those of one size are parts of one array, for which NumPy asks the system for large
    pages: a batch of two views is made in a tenth less time (measured)."""
    sizes = collections.Counter(view.size for view in plan)
    return [room for size, count in sizes.items() for room in np.empty((count, batch, size, size, channels), np.uint8)]


def _tries(
    draws: Draws, least: Float[Tensor, " batch"], most: Float[Tensor, " batch"]
) -> list[list[tuple[float, float]]]:
    """Of each image, areas relative to it and ratios of width to height, the first of which that fits is taken."""
    area = least[:, None] + (most - least)[:, None] * draws.units(_TRIES)
    low, high = (math.log(ratio) for ratio in _RATIOS)
    ratio = torch.exp(low + (high - low) * draws.units(_TRIES))
    return [list(zip(*row, strict=True)) for row in torch.stack([area, ratio], 1).tolist()]


def box(
    height: int, width: int, tries: Sequence[tuple[float, float]], corner: Sequence[float]
) -> tuple[int, int, int, int]:
    """The cut of torchvision's RandomResizedCrop: top, left, height, width, in whole pixels.

    Args:
        height: of the image.
        width: of the image.
        tries: area relative to the image, and ratio of width to height; the first that fits is taken, else the largest cut
            in the middle whose ratio is allowed.
        corner: two numbers in [0, 1): where the cut lies, from the top and from the left.
    """
    for area, ratio in tries:
        wide, high = round(math.sqrt(area * height * width * ratio)), round(math.sqrt(area * height * width / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(corner[0] * (height - high + 1)), int(corner[1] * (width - wide + 1)), high, wide
    least, most = _RATIOS
    if width / height < least:
        wide, high = width, round(width / least)
    elif width / height > most:
        wide, high = round(height * most), height
    else:
        wide, high = width, height
    return (height - high) // 2, (width - wide) // 2, high, wide


def _of_grey(maps: Float[Tensor, "batch 3 3"]) -> Float[Tensor, "batch 1 1"]:
    return maps.sum(2, keepdim=True)[:, :1]


def _blur(pixels: Tensor, sigma: Float[Tensor, " batch"], *, radius: int) -> Tensor:
    batch, channels, size, _ = pixels.shape
    places = torch.arange(-radius, radius + 1, device=pixels.device)
    sigma = sigma.clamp(min=1e-3)  # a kernel of one point where there is no blur
    kernel = torch.exp(-places.square() / (2 * sigma[:, None].square()))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (B C, 2 radius + 1)
    flat = F.pad(pixels.reshape(1, batch * channels, size, size), (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    return flat.view(batch, channels, size, size)


def build(config: Config, *, image_size: int, max_side: int) -> Natural:
    return Natural(config, image_size)
