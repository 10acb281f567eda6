"""Colour jitter as linear maps: brightness, contrast, saturation and hue in any order, folded into one map an image.

A step takes a pixel x of an image whose mean is m to C x + D m, so that any run of steps is A x + B m with A and B known
before the image is: the same matrices serve one core and a GPU. What folding leaves out is the clamping between steps.
"""

import dataclasses
import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from darkmatter.augmentations._draws import Draws

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

Maps = Float[Tensor, "batch 3 6"]
"""A and B side by side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Colours:
    """What is done to the colours of each image of a batch."""

    order: Int64[Tensor, "batch 4"]
    """The steps, first to last."""
    factors: Float[Tensor, "batch 4"]
    """Of brightness, contrast and saturation, 1 for none; of hue in turns, 0 for none."""
    jittered: Bool[Tensor, " batch"]
    """Whether the steps are done at all."""
    grey: Bool[Tensor, " batch"]
    """Whether all colour is taken away, after them."""

    @classmethod
    def draw(
        cls, draws: Draws, jitter: list[float], *, jitter_probability: float, grey_probability: float
    ) -> "Colours":
        """As torchvision's ColorJitter: each factor from 1 - j to 1 + j, hue from -j to j, in an order drawn as well."""
        order = draws.units(4).argsort(1)
        jittered = draws.chance(jitter_probability)
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=order.device)
        spread = torch.tensor(jitter, device=order.device)
        least = torch.where(neutral > 0, (neutral - spread).clamp(min=0), -spread)
        factors = least + (neutral + spread - least) * draws.units(4)
        return cls(
            order=order,
            factors=torch.where(jittered[:, None], factors, neutral),
            jittered=jittered,
            grey=draws.chance(grey_probability),
        )

    @property
    def place_of_hue(self) -> Int64[Tensor, " batch"]:
        return (self.order == HUE).int().argmax(1)

    def maps(self, which: Bool[Tensor, "batch 4"] | None = None, *, grey: bool = True) -> Maps:
        """The steps at the chosen places (all without `which`), and the loss of colour if `grey`, folded."""
        device = self.order.device
        identity = torch.eye(3, device=device)
        mean_grey = torch.tensor(_GREY, device=device).expand(3, 3)
        brightness, contrast, saturation, turns = (one[:, None, None] for one in self.factors.unbind(1))
        step = torch.stack(
            [
                brightness * identity,
                contrast * identity,
                saturation * identity + (1 - saturation) * mean_grey,
                _rotation(turns[:, 0, 0]),
            ],
            dim=1,
        )
        of_mean = torch.zeros_like(step)
        of_mean[:, CONTRAST] = (1 - contrast) * mean_grey
        rows = torch.arange(len(self.order), device=device)
        a, b = identity.expand(len(rows), 3, 3), torch.zeros(len(rows), 3, 3, device=device)
        for place in range(4):
            c, d = step[rows, self.order[:, place]], of_mean[rows, self.order[:, place]]
            used = torch.ones_like(self.jittered) if which is None else which[:, place]
            used = used[:, None, None]
            a, b = torch.where(used, c @ a, a), torch.where(used, c @ b + d @ (a + b), b)
        if grey:
            lost = self.grey[:, None, None]
            a, b = torch.where(lost, mean_grey @ a, a), torch.where(lost, mean_grey @ b, b)
        return torch.cat([a, b], dim=2)


def _rotation(turns: Float[Tensor, " batch"]) -> Float[Tensor, "batch 3 3"]:
    """Of the hue, in the YIQ plane; not HSV's: 28 dB from it at a tenth of a turn (measured)."""
    yiq = torch.tensor(_YIQ, device=turns.device)
    angle = -2 * math.pi * turns
    cos, sin, one, zero = torch.cos(angle), torch.sin(angle), torch.ones_like(angle), torch.zeros_like(angle)
    rows = ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))
    return yiq.inverse() @ torch.stack([torch.stack(row, 1) for row in rows], 1) @ yiq
