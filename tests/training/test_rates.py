import math

import pytest
import torch
from torch import nn

from darkmatter.training.optimizers import adamw, set_learning_rate
from darkmatter.training.rates import learning_rate


def test_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, peak=2.0, warmup=10, total=110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[110] == pytest.approx(0.0)
    assert learning_rate(0, peak=1.0, warmup=0, total=4) == 1.0


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    optimizer = adamw(network, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    set_learning_rate(optimizer, 0.1)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("0.weight", "3.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
