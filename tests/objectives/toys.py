"""Small networks in double precision, for tests of every objective; options small enough to run in milliseconds.

Each objective has `test_<name>.py` beside this file. It holds, besides the tests of the method's own formula, what the tests
of every objective need to know: `SMALL`, options for the toy; `DIGITS`, options for a minute on real images; `collapse`,
the known way to break it.
"""

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import nn

from darkmatter import plugin
from darkmatter.backbones import Backbone
from darkmatter.objectives import Objective

NAMES = plugin.names("objectives")
NUM_SAMPLES = 24


class Toy(nn.Module):
    """(B, 1, 8, 8) -> a map of 4 x 4 places -> 12 features. With a batch norm, since that is what couples ranks."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def forward_head(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)


def own_tests(name: str) -> ModuleType:
    return importlib.import_module(f"test_{name}")


def objective(name: str, *, seed: int = 0, **options: Any) -> Objective:
    module = plugin.load("objectives", name, where="test")
    torch.manual_seed(seed)
    backbone = Backbone(Toy(), mean=[0.4], std=[0.3], image_size=8)
    return module.build(module.Config(**{**own_tests(name).SMALL, **options}), backbone, NUM_SAMPLES).double()


def views(batch: int, *, seed: int = 1, like: Objective | None = None) -> tuple[torch.Tensor, ...]:
    """Two noisy views of random images; for `like`, as many as it takes, and two of half the size if it takes those."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 1, 8, 8, dtype=torch.float64, generator=generator)
    sizes = [8] * (like.num_views if like else 2) + [4, 4] * (like is not None and like.takes_local_views)
    return tuple(
        ((images + 0.1 * torch.rand(images.shape, dtype=torch.float64, generator=generator)) / 1.1)[..., :size, :size]
        for size in sizes
    )


def samples(batch: int, *, seed: int = 1) -> torch.Tensor:
    """Their numbers in the training split, all different."""
    return torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(seed))[:batch]


def step(method: Objective, batch: int, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """The terms of the loss for the views and samples of a seed, as in training: torch's generator set before."""
    torch.manual_seed(seed)
    return dict(method(views(batch, seed=seed, like=method), samples(batch, seed=seed)))


def source_names_paper(name: str) -> bool:
    text = inspect.getdoc(plugin.load("objectives", name, where="test")) or ""
    return "https://" in text and "authors' code" in text
