import itertools
import math

import pytest
import torch
from torch import nn
from toys import objective

from darkmatter.backbones import Backbone, small_conv, timm
from darkmatter.training import optimizers, rates


def test_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    values = [rates.learning_rate(step, peak=2.0, warmup=10, total=110) for step in range(111)]
    assert values[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert values[10] == 2.0
    assert values[60] == pytest.approx(1.0)
    assert values[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert values[110] == pytest.approx(0.0)
    assert rates.learning_rate(0, peak=1.0, warmup=0, total=4) == 1.0


def test_weight_decay_goes_from_one_value_to_another_along_a_cosine() -> None:
    values = [rates.cosine(step, 0.04, 0.4, total=100) for step in range(101)]
    assert (values[0], values[100]) == pytest.approx((0.04, 0.4))
    assert values[50] == pytest.approx(0.22)
    assert values == sorted(values)
    assert rates.cosine(7, 0.05, 0.05, total=10) == 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_weights_decay_and_norms_and_biases_do_not(name: str) -> None:
    made = network()
    optimizer = optimizers.build(made, name)
    before = {key: p.detach().clone() for key, p in made.named_parameters()}
    optimizers.set_rates(optimizer, 0.1, 0.5)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in made.named_parameters():
        factor = 1 - 0.1 * 0.5 if key in ("0.weight", "3.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[key] * factor)


def test_lars_is_the_papers_update() -> None:
    """Algorithm 1: v <- m v + gamma eta |w| / (|g| + beta |w|) (g + beta w), w <- w - v; gamma may stand outside of v."""
    made, rate, decay = network(), 0.3, 0.01
    optimizer = optimizers.build(made, "lars")
    expected = {key: p.detach().clone() for key, p in made.named_parameters()}
    velocity = {key: torch.zeros_like(p) for key, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizers.set_rates(optimizer, rate, decay)
        for key, parameter in made.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad, weight = gradient.clone(), expected[key]
            if weight.dim() > 1:
                trust = 0.001 * weight.norm() / (gradient.norm() + decay * weight.norm())
                gradient = trust * (gradient + decay * weight)
            velocity[key] = 0.9 * velocity[key] + gradient
            expected[key] = weight - rate * velocity[key]
        optimizer.step()
    for key, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key])


def test_lower_layers_of_a_backbone_learn_more_slowly() -> None:
    vit = timm.build(timm.Config(model="vit_tiny_patch16_224"), channels=1, image_size=32)
    whole = nn.Sequential(Backbone(vit, mean=[0.4], std=[0.3], image_size=32), nn.Linear(192, 8))
    optimizer = optimizers.build(whole, layer_decay=0.5)
    optimizers.set_rates(optimizer, 1.0, 0.1)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[whole[1].weight] == rate[whole[1].bias] == 1.0
    blocks = [rate[block.attn.qkv.weight] for block in vit.blocks]
    assert [lower / upper for lower, upper in itertools.pairwise(blocks)] == [0.5] * 11
    assert blocks[0] > rate[vit.patch_embed.proj.weight]
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {p for p in whole.parameters() if p.dim() > 1} == decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(whole.parameters()))


def test_the_small_network_has_four_layers_and_one_that_tells_none_is_refused() -> None:
    small = Backbone(
        small_conv.build(small_conv.Config(), channels=1, image_size=28), mean=[0.4], std=[0.3], image_size=28
    )
    optimizer = optimizers.build(small, layer_decay=0.5)
    optimizers.set_rates(optimizer, 1.0, 0.1)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.0625, 0.125, 0.25, 0.5]
    with pytest.raises(ValueError, match=r"Toy has no group_matcher.*pretrain\.layer_decay"):
        optimizers.build(objective("simclr"), layer_decay=0.5)
