"""Changes of pictures that a representation is asked about: corruptions that it should not mind, and an object pasted at a
place that it should know.

Corruptions are those of D. Hendrycks and T. Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations" (2019), https://arxiv.org/abs/1903.12261, of the kinds that make sense at any size; their strengths, chosen
there for 224 pixels, are given relative to the picture. What is drawn is a function of (seed, sample).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageFilter

Pictures = UInt8[np.ndarray, "batch channels size size"]
Corruption = Literal["noise", "blur", "contrast", "brightness", "occlusion"]
_PASTED = 0.4  # of the side: an object, on a quarter of the patches that it could be on


@dataclasses.dataclass(frozen=True)
class Change:
    """One of all pictures of a split."""

    name: Corruption | Literal["paste"]
    severity: int = 3
    """Of a corruption, 1 to 5."""

    def apply(self, pictures: Pictures, samples: Int64[np.ndarray, " batch"], *, seed: int) -> Pictures:
        """
        Args:
            pictures: stay as they are.
            samples: the number of each in its split.
            seed: of all that is drawn.
        """
        if self.name == "paste":
            return _paste(pictures, samples, seed)
        corrupt = _CORRUPTIONS[self.name]
        rows = [
            corrupt(picture.astype(np.float32) / 255, self.severity, _draws(seed, sample, self.name))
            for picture, sample in zip(pictures, samples.tolist(), strict=True)
        ]
        return np.clip(np.stack(rows) * 255 + 0.5, 0, 255).astype(np.uint8)

    def __str__(self) -> str:
        return self.name if self.name == "paste" else f"{self.name} {self.severity}"


def pasted_at(samples: Int64[np.ndarray, " batch"], *, seed: int) -> Float[np.ndarray, "batch 2"]:
    """Where `paste` puts the centre of its object: down and right, in parts of the side."""
    free = 1 - _PASTED
    return np.stack([_draws(seed, sample, "paste").random(2) * free + _PASTED / 2 for sample in samples.tolist()])


def pasted_mask(samples: Int64[np.ndarray, " batch"], grid: int, *, seed: int) -> Bool[np.ndarray, "batch grid grid"]:
    """The patches whose centre the object covers."""
    centres = (np.arange(grid) + 0.5) / grid
    near = np.abs(centres[None, None] - pasted_at(samples, seed=seed)[:, :, None]) <= _PASTED / 2  # (B, 2, G)
    return near[:, 0, :, None] & near[:, 1, None, :]


def _paste(pictures: Pictures, samples: Int64[np.ndarray, " batch"], seed: int) -> Pictures:
    """The picture itself, shrunk, on an even ground of its darkest or lightest level: nothing but the object tells where."""
    side = pictures.shape[-1]
    small = max(1, round(_PASTED * side))
    out = np.empty_like(pictures)
    for row, (picture, centre) in enumerate(zip(pictures, pasted_at(samples, seed=seed), strict=True)):
        ground = np.median(picture[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)  # of its corners
        out[row] = ground[:, None, None].astype(np.uint8)
        top, left = np.clip(np.round(centre * side - small / 2).astype(int), 0, side - small)
        resized = [Image.fromarray(channel).resize((small, small), Image.Resampling.BOX) for channel in picture]
        out[row, :, top : top + small, left : left + small] = np.stack([np.asarray(one) for one in resized])
    return out


def _noise(picture: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    return picture + draws.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1], size=picture.shape)


def _blur(picture: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    radius = (1, 2, 3, 4, 6)[severity - 1] / 224 * picture.shape[-1]
    levels = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    blurred = [Image.fromarray(channel).filter(ImageFilter.GaussianBlur(radius)) for channel in levels]
    return np.stack([np.asarray(one) for one in blurred]).astype(np.float32) / 255


def _contrast(picture: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    mean = picture.mean((1, 2), keepdims=True)
    return (picture - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean


def _brightness(picture: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    return picture + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]


def _occlusion(picture: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    """A grey square somewhere. T. DeVries, G. Taylor, "Cutout" (2017), https://arxiv.org/abs/1708.04552."""
    side = picture.shape[-1]
    hidden = round((0.2, 0.3, 0.4, 0.5, 0.6)[severity - 1] * side)
    top, left = draws.integers(0, side - hidden + 1, 2)
    changed = picture.copy()
    changed[:, top : top + hidden, left : left + hidden] = 0.5
    return changed


_CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "occlusion": _occlusion,
}


def _draws(seed: int, sample: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, sample, *name.encode()])
