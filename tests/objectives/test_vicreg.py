import math

import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import vicreg

SMALL = {"projector": [8, 5]}
DIGITS = {"projector": [64, 64]}


def collapse(method: vicreg.VICReg, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its variance term."""
    method.config = method.config.model_copy(update={"variance": 0.0})


def terms_by_the_paper(first: list[list[float]], second: list[list[float]]) -> tuple[float, float, float]:
    """Bardes et al. 2022 in plain Python; scaling of the terms as in facebookresearch/vicreg, main_vicreg.py: the
    invariance is a mean over batch and dimensions, std_loss halves the sum of its two hinges, cov_loss does not."""
    n, d = len(first), len(first[0])

    def column_mean(z: list[list[float]], j: int) -> float:
        return sum(row[j] for row in z) / n

    def covariance(z: list[list[float]], i: int, j: int) -> float:
        mean_i, mean_j = column_mean(z, i), column_mean(z, j)
        return sum((row[i] - mean_i) * (row[j] - mean_j) for row in z) / (n - 1)

    def v(z: list[list[float]]) -> float:
        return sum(max(0.0, 1 - math.sqrt(covariance(z, j, j) + 1e-4)) for j in range(d)) / d

    def c(z: list[list[float]]) -> float:
        return sum(covariance(z, i, j) ** 2 for i in range(d) for j in range(d) if i != j) / d

    s = sum((a - b) ** 2 for u, w in zip(first, second, strict=True) for a, b in zip(u, w, strict=True)) / (n * d)
    return s, (v(first) + v(second)) / 2, c(first) + c(second)


@pytest.mark.parametrize(("batch", "dim"), [(4, 3), (9, 5), (5, 9)])
def test_each_term_is_the_papers(batch: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(batch * dim)
    first, second = (0.8 * torch.randn(batch, dim, dtype=torch.float64, generator=generator) for _ in range(2))
    s, v, c = terms_by_the_paper(first.tolist(), second.tolist())
    assert vicreg.invariance(first, second).item() == pytest.approx(s, abs=1e-9)
    assert (vicreg.variance(first) + vicreg.variance(second)).item() / 2 == pytest.approx(v, abs=1e-9)
    assert (vicreg.covariance(first) + vicreg.covariance(second)).item() == pytest.approx(c, abs=1e-9)


def test_loss_adds_them_up_with_the_coefficients_of_the_paper() -> None:
    method = objective("vicreg")
    x, y = views(8)
    s, v, c = terms_by_the_paper(
        method.projector(method.backbone(x)).tolist(), method.projector(method.backbone(y)).tolist()
    )
    terms = objective("vicreg")((x, y), samples(8))
    assert terms["loss"].item() == pytest.approx(25 * s + 25 * v + 1 * c, abs=1e-9)
    found = [terms[name].item() for name in ("invariance", "variance", "covariance")]
    assert found == pytest.approx([s, v, c], abs=1e-9)


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance"])
def test_each_coefficient_weighs_its_own_term(term: str) -> None:
    x, y = views(8)
    base, heavier = objective("vicreg")((x, y), samples(8)), objective("vicreg", **{term: 100.0})((x, y), samples(8))
    usual = vicreg.Config().model_dump()[term]
    expected = base["loss"] + (100 - usual) * base[term]
    torch.testing.assert_close(heavier["loss"].detach(), expected.detach())


def test_energy_is_the_mean_squared_distance_of_the_projections() -> None:
    method = objective("vicreg").eval()
    x, y = views(5)
    u, v = method.projector(method.backbone(x)), method.projector(method.backbone(y))
    expected = [((a - b) ** 2).mean().item() for a, b in zip(u, v, strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
