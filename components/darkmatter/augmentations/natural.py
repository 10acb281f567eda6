"""Views of photographs and drawings: random resized crop, mirror, colour jitter, grey, blur, solarize.

The policy of SimCLR (appendix A of https://arxiv.org/abs/2002.05709) by default; BYOL's and DINO's by their options. What is
drawn has torchvision's distributions; `engine` says how the pixels are computed, and where.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from darkmatter import images
from darkmatter.augmentations import Draws, Prepared, View, Views, ViewsConfig, _cpu
from darkmatter.augmentations._colour import Colours

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
        plan = self.plan(whole)
        drawn = [_Drawn(self, view, seed, epoch, torch.from_numpy(samples)) for view in plan]
        done, sizes = [], np.empty((len(contents), 2), np.int64)
        for index, content in enumerate(contents):
            pixels = images.decode_own(content)
            sizes[index] = pixels.shape[:2]
            if not index:
                done = [np.empty((len(contents), view.size, view.size, pixels.shape[2]), np.uint8) for view in plan]
            for out, one in zip(done, drawn, strict=True):
                out[index] = one.view(pixels, index)
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
        return tuple(
            self._on_device(pixels, _Effects(self, view, seed, epoch, prepared.samples))
            for pixels, view in zip(views, self.plan(whole), strict=True)
        )

    def _on_device(self, pixels: Tensor, effects: "_Effects") -> Tensor:
        mean = pixels.mean((2, 3))
        a, b = effects.colours.maps().split(3, dim=2)
        if pixels.shape[1] == 1:
            a, b = _of_grey(a), _of_grey(b)
        lift = torch.einsum("bij,bj->bi", b, mean)
        pixels = (torch.einsum("bij,bjhw->bihw", a, pixels) + lift[:, :, None, None]).clamp(0, 1)
        pixels = _blur(pixels, effects.sigma, radius=math.ceil(3 * self._sigma[1])).clamp(0, 1)
        inverted = torch.minimum(pixels, 1 - pixels)
        return torch.where(effects.solarized[:, None, None, None], inverted, pixels)


class _Effects:
    """What is drawn for one view of each image of a batch, but for the cut."""

    def __init__(self, policy: Natural, view: View, seed: int, epoch: int, samples: Int64[Tensor, " batch"]) -> None:
        config = policy.config
        kind = 2 if view.local else min(view.number, 1)
        draws = self.draws = Draws.of(seed=seed, epoch=epoch, samples=samples, view=view.number)
        self.colours = Colours.draw(
            draws,
            config.jitter,
            jitter_probability=config.jitter_probability,
            grey_probability=config.grey_probability,
        )
        sigma = draws.uniform(*policy._sigma)
        self.sigma = torch.where(draws.chance(config.blur_probability[kind]), sigma, 0.0)
        self.solarized = draws.chance(config.solarize_probability[kind])


class _Drawn:
    """The same and the cut, as plain numbers, for a loop over the images."""

    def __init__(self, policy: Natural, view: View, seed: int, epoch: int, samples: Int64[Tensor, " batch"]) -> None:
        config = policy.config
        effects = _Effects(policy, view, seed, epoch, samples)
        areas = (config.local_min_area, config.min_area) if view.local else (config.min_area, 1.0)
        self.size, self.engine = view.size, config.engine
        self.tries = _tries(effects.draws, areas)
        self.corners = effects.draws.units(2).tolist()
        self.mirrored = effects.draws.chance(0.5).tolist()
        if config.engine == "device":
            return
        colours = effects.colours
        self.sigma, self.solarized = effects.sigma.tolist(), effects.solarized.tolist()
        self.jittered, self.grey = colours.jittered.tolist(), colours.grey.tolist()
        if config.engine == "fast":
            self.maps = [colours.maps().numpy()]
            return
        places, hue = torch.arange(4), colours.place_of_hue
        before, after = places < hue[:, None], places > hue[:, None]
        self.maps = [colours.maps(before, grey=False).numpy(), colours.maps(after).numpy()]
        self.place_of_hue, self.turns = hue.tolist(), colours.factors[:, 3].tolist()

    def view(self, pixels: _cpu.Pixels, index: int) -> _cpu.Pixels:
        top, left, height, width = box(pixels.shape[0], pixels.shape[1], self.tries[index], self.corners[index])
        resize = _cpu.resize_exact if self.engine == "exact" else _cpu.resize_fast
        pixels = resize(pixels[top : top + height, left : left + width], self.size)
        if self.mirrored[index]:
            pixels = cv2.flip(pixels, 1).reshape(pixels.shape)
        if self.engine == "device":
            return pixels
        if self.jittered[index] or self.grey[index]:
            pixels = self._colour(pixels, index)
        if self.sigma[index] > 0:
            pixels = _cpu.blur(pixels, self.sigma[index])
        return _cpu.solarize(pixels) if self.solarized[index] else pixels

    def _colour(self, pixels: _cpu.Pixels, index: int) -> _cpu.Pixels:
        if pixels.shape[2] == 1:
            for maps in self.maps:
                pixels = _cpu.map_grey(pixels, maps[index])
            return pixels
        if self.engine == "fast":
            return _cpu.map_colour(pixels, self.maps[0][index])
        if self.jittered[index]:
            if self.place_of_hue[index] > 0:
                pixels = _cpu.map_colour(pixels, self.maps[0][index])
            pixels = _cpu.turn_hue(pixels, self.turns[index])
        if self.grey[index] or self.place_of_hue[index] < 3:
            pixels = _cpu.map_colour(pixels, self.maps[1][index])
        return pixels


def _tries(draws: Draws, areas: tuple[float, float]) -> list[list[tuple[float, float]]]:
    """Of each image, areas relative to it and ratios of width to height, the first of which that fits is taken."""
    area = areas[0] + (areas[1] - areas[0]) * draws.units(_TRIES)
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
