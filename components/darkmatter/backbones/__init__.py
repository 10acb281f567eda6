"""Networks that turn an image into a vector. One file a family, chosen by `backbone.name`.

A backbone module defines `Config` and `build(config, *, channels, image_size) -> nn.Module`, a network that maps
normalised images (B, C, S, S) to features (B, D) and has the attribute `num_features` (D).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Backbone(nn.Module):
    """A network with its normalisation: takes pixels in [0, 1], so that nobody downstream can forget the statistics."""

    def __init__(self, network: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.num_features = int(network.num_features)  # type: ignore[arg-type]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch features"]:
        return self.network((images - self.mean) / self.std)
