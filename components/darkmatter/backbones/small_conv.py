"""A small convolutional network for images of 28 to 64 pixels, where the stems of larger networks lose everything."""

import torch
from pydantic import Field
from torch import Tensor, nn

from darkmatter.params import Config as _Config


class Config(_Config):
    width: int = Field(default=32, gt=0)
    """Channels of the first layer; the features are 8 times as many."""


class SmallConv(nn.Module):
    """Four 3x3 convolutions with batch norm, the first two with stride 2; mean and maximum over places.

    (B, C, S, S) -> (B, 8 width). No layer works at full resolution: that would take most of the time on a CPU.
    """

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        width = config.width
        self.num_features = 8 * width
        self.layers = nn.Sequential(
            _block(channels, width, stride=2),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 4 * width, stride=1),
            _block(4 * width, 4 * width, stride=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (B, 4 width, S / 4, S / 4)

    def forward_head(self, maps: Tensor) -> Tensor:
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which layers there are, from below, in the form of timm's models."""
        return {"blocks": r"^layers\.(\d+)"}


def _block(before: int, after: int, *, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def build(config: Config, *, channels: int, image_size: int) -> SmallConv:
    return SmallConv(config, channels)
