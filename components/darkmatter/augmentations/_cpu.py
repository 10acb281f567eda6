"""What a view does to the pixels of one image on one core: uint8 (height, width, channels) in and out."""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

Pixels = UInt8[np.ndarray, "_ _ channels"]


def resize_exact(pixels: Pixels, size: int) -> UInt8[np.ndarray, "{size} {size} channels"]:
    """Bilinear with antialias: Pillow's and torchvision's own, to within rounding (64 dB, measured)."""
    if max(pixels.shape[:2]) <= size:  # no need of antialias: OpenCV is four times as fast
        return _bilinear(pixels, size)
    # Torch must see the channels as last, also of a batch of one: else the answer comes in planes, which OpenCV would have
    # to gather at every step (0.35 ms each).
    image = torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def resize_fast(pixels: Pixels, size: int) -> UInt8[np.ndarray, "{size} {size} channels"]:
    """Halved by means while twice too large, then bilinear: a mip map. 40 dB from `resize_exact`, three times as fast."""
    while min(pixels.shape[:2]) >= 2 * size:
        half = pixels.shape[1] // 2, pixels.shape[0] // 2
        halved = cv2.resize(pixels[: half[1] * 2, : half[0] * 2], half, interpolation=cv2.INTER_AREA)
        pixels = halved.reshape(half[1], half[0], -1)
    return _bilinear(pixels, size)


def _bilinear(pixels: Pixels, size: int) -> UInt8[np.ndarray, "{size} {size} channels"]:
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR).reshape(size, size, -1)


def map_colour(pixels: Pixels, maps: Float[np.ndarray, "3 6"]) -> Pixels:
    """A x + B m, clamped; m is the mean of the pixels, which only a change of contrast needs."""
    of_mean = maps[:, 3:]
    lift = of_mean @ np.array(cv2.mean(pixels)[:3]) if of_mean.any() else np.zeros(3)
    return cv2.transform(pixels, np.column_stack([maps[:, :3], lift]))


def map_grey(pixels: Pixels, maps: Float[np.ndarray, "3 6"]) -> Pixels:
    """The same for one channel: what happens to a colour image whose channels are equal."""
    a, b = maps[0, :3].sum(), maps[0, 3:].sum()
    table = np.clip(np.rint(a * np.arange(256) + b * pixels.mean()), 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table).reshape(pixels.shape)


def turn_hue(pixels: Pixels, turns: float) -> Pixels:
    """In HSV, by a whole number of 256ths of a turn, as Pillow and torchvision do."""
    shift = int(turns * 255) % 256
    if not shift:
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)
    rows += np.tile(np.array([shift, 0, 0], np.uint8), hsv.shape[1])  # wraps; a third of hsv[..., 0] += ...
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(pixels: Pixels, sigma: float) -> Pixels:
    """A Gaussian, cut off at 3 sigma."""
    radius = math.ceil(3 * sigma)
    kernel = gaussian(sigma, radius)
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(pixels.shape)


def gaussian(sigma: float, radius: int) -> Float[np.ndarray, " taps"]:
    kernel = np.exp(-np.square(np.arange(-radius, radius + 1)) / (2 * sigma**2))
    return kernel / kernel.sum()


def solarize(pixels: Pixels) -> Pixels:
    """Pixels from 128 up are inverted: the smaller of a value and its inverse."""
    return cv2.min(pixels, cv2.bitwise_not(pixels)).reshape(pixels.shape)
