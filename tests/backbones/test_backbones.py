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

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x

    backbone = Backbone(Mean(), mean=[0.25, 0.5], std=[0.5, 0.1], image_size=4)
    images = torch.full((1, 2, 4, 4), 0.75)
    torch.testing.assert_close(backbone(images), torch.tensor([[1.0, 2.5]]))
    assert {"mean", "std"} <= set(backbone.state_dict())


def make(name: str, **options: object) -> Backbone:
    return Backbone(build(name, channels=3, size=32, **options), mean=[0.5] * 3, std=[0.2] * 3, image_size=32).eval()


FAMILIES = [("small_conv", {}), ("timm", {"model": "vit_tiny_patch16_224"}), ("timm", {"model": "resnet10t"})]


@pytest.mark.parametrize(("name", "options"), FAMILIES)
def test_patches_are_a_grid_and_both_agrees_with_forward(name: str, options: dict) -> None:
    backbone = make(name, **options)
    images = torch.rand(2, 3, 32, 32)
    features, tokens = backbone.both(images)
    torch.testing.assert_close(features, backbone(images))
    assert tokens.shape == (2, backbone.grid**2, backbone.token_features)
    torch.testing.assert_close(tokens, backbone.patches(images))


@pytest.mark.parametrize(("name", "options"), FAMILIES[:2])  # of 32 pixels the third makes one patch
def test_visible_patches_know_nothing_of_the_hidden_ones(name: str, options: dict) -> None:
    backbone = make(name, **options)
    side = 32 // backbone.grid
    images = torch.rand(2, 3, 32, 32)
    visible = torch.tensor([[1, 0], [1, 0]])
    before = backbone.patches(images, visible)
    assert before.shape == (2, 2, backbone.token_features)
    images[:, :, side:] = torch.rand_like(images[:, :, side:])  # all rows of patches but the first
    images[:, :, :, 2 * side :] = torch.rand_like(images[:, :, :, 2 * side :])
    torch.testing.assert_close(backbone.patches(images, visible), before, rtol=0, atol=0)
    images[:, :, 0, 0] += 0.5
    assert not torch.allclose(backbone.patches(images, visible), before)


def test_a_vision_transformer_with_every_patch_visible_is_the_whole_one() -> None:
    backbone = make("timm", model="vit_tiny_patch16_224")
    images = torch.rand(2, 3, 32, 32)
    order = torch.tensor([[3, 1, 0, 2], [0, 2, 3, 1]])
    assert backbone.drops_patches
    expected = backbone.patches(images).gather(1, order[:, :, None].expand(-1, -1, backbone.token_features))
    torch.testing.assert_close(backbone.patches(images, order), expected, rtol=1e-4, atol=1e-5)


def test_hidden_patches_have_the_mean_colour_and_the_others_stay() -> None:
    backbone = make("small_conv")
    images = torch.rand(1, 3, 32, 32)
    hidden = torch.zeros(1, 64, dtype=torch.bool)
    hidden[0, 9] = True  # second row, second column, of 4 x 4 pixels
    painted = backbone.hide(images, hidden)
    assert (painted[:, :, 4:8, 4:8] == 0.5).all()
    painted[:, :, 4:8, 4:8] = images[:, :, 4:8, 4:8]
    assert torch.equal(painted, images)


def test_freezing_the_head_leaves_what_the_patches_need() -> None:
    backbone = make("timm", model="convnext_atto")  # its head has a norm
    backbone.freeze_head()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {"network.head.norm.weight", "network.head.norm.bias"}
