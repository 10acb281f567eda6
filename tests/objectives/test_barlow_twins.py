import math

import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import barlow_twins

SMALL = {"projector": [8, 5]}
DIGITS = {"projector": [64, 64], "off_diagonal": 0.02}


def collapse(method: barlow_twins.BarlowTwins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the invariance term; the paper's ablation (section 4) falls to chance. No view is asked to be like another."""
    monkeypatch.setattr(barlow_twins, "on_diagonal", lambda c: 0.0 * c.sum())


def normalised(z: list[list[float]]) -> list[list[float]]:
    """Batch norm without scale and shift, as `self.bn` of facebookresearch/barlowtwins, main.py (its epsilon: 1e-5)."""
    n, d = len(z), len(z[0])
    means = [sum(row[j] for row in z) / n for j in range(d)]
    variances = [sum((row[j] - means[j]) ** 2 for row in z) / n for j in range(d)]
    return [[(row[j] - means[j]) / math.sqrt(variances[j] + 1e-5) for j in range(d)] for row in z]


def terms_by_the_paper(first: list[list[float]], second: list[list[float]]) -> tuple[float, float]:
    """Zbontar et al. 2021, equations 1 and 2, in plain Python; both terms are sums, as in the authors' main.py."""
    n, d = len(first), len(first[0])
    a, b = normalised(first), normalised(second)
    c = [[sum(a[k][i] * b[k][j] for k in range(n)) / n for j in range(d)] for i in range(d)]
    on = sum((1 - c[i][i]) ** 2 for i in range(d))
    off = sum(c[i][j] ** 2 for i in range(d) for j in range(d) if i != j)
    return on, off


def projections(method: barlow_twins.BarlowTwins, x: torch.Tensor) -> list[list[float]]:
    return method.projector(method.backbone(x)).tolist()


@pytest.mark.parametrize("weight", [0.0051, 0.7])
def test_loss_and_terms_are_equation_1(weight: float) -> None:
    x, y = views(9)
    on, off = terms_by_the_paper(*(projections(objective("barlow_twins"), view) for view in (x, y)))
    terms = objective("barlow_twins", **({} if weight == 0.0051 else {"off_diagonal": weight}))((x, y), samples(9))
    found = [terms[name].item() for name in ("on_diagonal", "off_diagonal", "loss")]
    assert found == pytest.approx([on, off, on + weight * off], abs=1e-9)


def test_the_first_view_is_correlated_with_the_second_in_this_order() -> None:
    a, b = torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 5.0]])
    expected = [[(1 * 3 - 1 * 1) / 2, (0 - 5) / 2], [(2 * 3) / 2, 0.0]]
    assert barlow_twins.cross_correlation(a, b).tolist() == expected


def test_the_correlation_is_not_rounded_under_autocast() -> None:
    a, b = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = barlow_twins.cross_correlation(a, b)
    torch.testing.assert_close(c, a.T @ b / 16, rtol=1e-6, atol=1e-6)


def test_energy_is_the_mean_squared_distance_of_projections_normalised_by_the_running_statistics() -> None:
    method = objective("barlow_twins")
    method(views(9), samples(9))  # moves the statistics
    method.eval()
    variance = method.normalise.running_var.tolist()
    x, y = views(5, seed=2)
    expected = [
        sum(((a - b) / math.sqrt(v + 1e-5)) ** 2 for a, b, v in zip(first, second, variance, strict=True)) / 5
        for first, second in zip(projections(method, x), projections(method, y), strict=True)
    ]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
