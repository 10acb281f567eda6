import pytest
import torch

from darkmatter import plugin
from darkmatter.backbones import Backbone


def build(name: str, *, channels: int, size: int, **options: object) -> torch.nn.Module:
    module, config = plugin.choose("backbones", {"name": name, name: options}, where="backbone")
    return module.build(config, channels=channels, image_size=size)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", plugin.names("backbones"))
def test_every_backbone_gives_features_of_the_size_it_says(name: str, channels: int) -> None:
    network = build(name, channels=channels, size=32).eval()
    assert network(torch.rand(2, channels, 32, 32)).shape == (2, network.num_features)


@pytest.mark.parametrize("name", plugin.names("backbones"))
def test_every_parameter_is_trained(name: str) -> None:
    network = build(name, channels=1, size=64)
    features = network(torch.rand(4, 1, 64, 64))
    (features * torch.rand_like(features)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_timm_families_take_other_sizes_and_channels(model: str) -> None:
    network = build("timm", channels=1, size=64, model=model).eval()
    assert network(torch.rand(2, 1, 64, 64)).shape == (2, network.num_features)


def test_normalisation_is_part_of_the_backbone() -> None:
    class Mean(torch.nn.Module):
        num_features = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    backbone = Backbone(Mean(), mean=[0.25, 0.5], std=[0.5, 0.1])
    images = torch.full((1, 2, 4, 4), 0.75)
    torch.testing.assert_close(backbone(images), torch.tensor([[1.0, 2.5]]))
    assert {"mean", "std"} <= set(backbone.state_dict())
