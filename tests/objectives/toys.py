"""Small networks in double precision, for tests of every objective; options small enough to run in milliseconds."""

import inspect
from typing import Any

import torch
from torch import nn

from darkmatter import plugin
from darkmatter.backbones import Backbone
from darkmatter.objectives import Objective

NAMES = plugin.names("objectives")


class Toy(nn.Module):
    """With a batch norm, since that is what couples ranks."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def objective(name: str, *, seed: int = 0, **options: Any) -> Objective:
    module = plugin.load("objectives", name, where="test")
    fields = module.Config.model_fields
    small = {"projector": [8, 5]} if "projector" in fields else {}
    torch.manual_seed(seed)
    built = module.build(module.Config(**{**small, **options}), Backbone(Toy(), mean=[0.4], std=[0.3]))
    return built.double()


def views(batch: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 1, 8, 8, dtype=torch.float64, generator=generator)
    return tuple(
        (images + 0.1 * torch.rand(images.shape, dtype=torch.float64, generator=generator)) / 1.1 for _ in range(2)
    )  # type: ignore[return-value]


def source_names_paper(name: str) -> bool:
    text = inspect.getdoc(plugin.load("objectives", name, where="test")) or ""
    return "https://arxiv.org/" in text and "authors' code" in text
