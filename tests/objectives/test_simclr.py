import math

import pytest
import torch
import torch.nn.functional as F
from toys import objective, samples, views

from darkmatter.objectives import simclr

SMALL = {"projector": [8, 5]}
DIGITS = {"projector": [64, 32]}


def collapse(method: simclr.SimCLR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other samples in the denominator only the pull is left."""
    monkeypatch.setattr(simclr, "nt_xent", lambda first, second, temperature: -(first * second).sum(1).mean())


def nt_xent_by_equation_1(z: list[list[float]], temperature: float) -> float:
    """Chen et al. 2020, equation 1 and algorithm 1, in plain Python: rows 2k-1 and 2k are views of sample k."""

    def similarity(u: list[float], v: list[float]) -> float:
        dot = sum(a * b for a, b in zip(u, v, strict=True))
        return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))

    def one(i: int, j: int) -> float:
        others = sum(math.exp(similarity(z[i], z[k]) / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(similarity(z[i], z[j]) / temperature) / others)

    samples = len(z) // 2
    return sum(one(2 * k, 2 * k + 1) + one(2 * k + 1, 2 * k) for k in range(samples)) / (2 * samples)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("batch", [2, 5, 9])
def test_loss_is_equation_1(batch: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(batch)
    first, second = (torch.randn(batch, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    interleaved = torch.stack([first, second], 1).flatten(0, 1).tolist()
    ours = simclr.nt_xent(F.normalize(first, dim=1), F.normalize(second, dim=1), temperature)
    assert ours.item() == pytest.approx(nt_xent_by_equation_1(interleaved, temperature), abs=1e-9)


def test_objective_applies_it_to_unit_projections() -> None:
    method = objective("simclr", temperature=0.3)
    x, y = views(6)
    z = method.projector(method.backbone(torch.cat([x, y])))
    first, second = z.chunk(2)
    expected = nt_xent_by_equation_1(torch.stack([first, second], 1).flatten(0, 1).tolist(), 0.3)
    method.load_state_dict(objective("simclr", temperature=0.3).state_dict())  # the running statistics moved
    assert method((x, y), samples(6))["loss"].item() == pytest.approx(expected, abs=1e-9)


def test_energy_is_the_negative_cosine_over_the_temperature() -> None:
    method = objective("simclr", temperature=0.25).eval()
    x, y = views(5)
    u, v = method.projector(method.backbone(x)), method.projector(method.backbone(y))
    expected = [-(a @ b / a.norm() / b.norm() / 0.25).item() for a, b in zip(u, v, strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)


def test_constant_features_give_the_loss_of_chance() -> None:
    """Collapse: every view alike. 2N - 1 others, all as near as the partner."""
    same = F.normalize(torch.ones(8, 4, dtype=torch.float64), dim=1)
    assert simclr.nt_xent(same, same, 0.1).item() == pytest.approx(math.log(15), abs=1e-9)
