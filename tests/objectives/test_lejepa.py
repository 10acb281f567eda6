import math

import pytest
import torch
from toys import objective, samples, step, views

from darkmatter.objectives import lejepa

SMALL = {"projector": [8, 5], "slices": 6}
DIGITS = {"projector": [64, 16], "slices": 64}


def collapse(method: lejepa.LeJEPA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SIGReg."""
    method.config = method.config.model_copy(update={"regulariser": 0.0})


Rows = list[list[float]]


def epps_pulley(u: list[float]) -> float:
    """rbalestr-lab/lejepa, lejepa/univariate/epps_pulley.py in plain Python: N times the integral from -3 to 3 of
    |ecf(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by trapezoids between 33 knots, of which the code computes the 17 from 0."""
    n, width = len(u), 3 / 16
    knots = [width * k for k in range(-16, 17)]
    values = []
    for t in knots:
        ecf = sum(complex(math.cos(t * value), math.sin(t * value)) for value in u) / n
        values.append(abs(ecf - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))
    return n * width * (sum(values) - (values[0] + values[-1]) / 2)


def sigreg_by_the_code(views_of_all: list[Rows], directions: Rows) -> float:
    """Mean over views and directions, as in MINIMAL.md (its statistic keeps the views apart)."""
    statistics = []
    for rows in views_of_all:
        for k in range(len(directions[0])):
            statistics.append(
                epps_pulley([sum(a * d[k] for a, d in zip(row, directions, strict=True)) for row in rows])
            )
    return sum(statistics) / len(statistics)


def prediction_by_the_code(views_of_all: list[Rows]) -> float:
    """The mean squared distance of all views to the mean of the first two, which see the whole image."""
    n, d = len(views_of_all[0]), len(views_of_all[0][0])
    distance = 0.0
    for i in range(n):
        for j in range(d):
            centre = (views_of_all[0][i][j] + views_of_all[1][i][j]) / 2
            distance += sum((rows[i][j] - centre) ** 2 for rows in views_of_all)
    return distance / (n * d * len(views_of_all))


def projections(method: lejepa.LeJEPA, images: tuple[torch.Tensor, ...]) -> list[Rows]:
    """The projector sees all views together, as in MINIMAL.md; the backbone those of one size."""
    parts = [torch.cat(images[:2]), *([torch.cat(images[2:])] if images[2:] else [])]
    z = method.projector(torch.cat([method.backbone(part) for part in parts]))
    return [view.tolist() for view in z.chunk(len(images))]


def directions(seed: int) -> Rows:
    """Six unit vectors, normal draws over their length: the first thing that the loss draws."""
    torch.manual_seed(seed)
    draw = torch.randn(5, 6, dtype=torch.float64)
    return (draw / draw.square().sum(0).sqrt()).tolist()


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("weight", [0.02, 0.3])
def test_loss_and_terms_are_those_of_the_authors(local: bool, weight: float) -> None:
    images = views(7, like=objective("lejepa"))[: 4 if local else 2]
    method = objective("lejepa")
    by_view = projections(method, images)
    distance, statistic = prediction_by_the_code(by_view), sigreg_by_the_code(by_view, directions(3))
    method = objective("lejepa", **({} if weight == 0.02 else {"regulariser": weight}))
    torch.manual_seed(3)
    terms = method(images, samples(7))
    found = [terms[name].item() for name in ("prediction", "sigreg", "loss")]
    assert found == pytest.approx([distance, statistic, (1 - weight) * distance + weight * statistic], abs=1e-9)


def test_sigreg_is_small_for_a_standard_normal_and_large_for_what_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 2000, 4, dtype=torch.float64, generator=generator)
    along = torch.eye(4, dtype=torch.float64)
    small = lejepa.sigreg(normal, along)
    for other in (torch.zeros_like(normal), 2 * normal, normal + 1, normal.sign()):
        assert lejepa.sigreg(other, along) > 20 * small


def test_sigreg_is_not_rounded_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    z, along = torch.randn(1, 32, 4, generator=generator), torch.randn(4, 3, generator=generator)
    expected = lejepa.sigreg(z, along)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(lejepa.sigreg(z, along), expected, rtol=1e-6, atol=0)


def test_every_step_has_directions_of_its_own() -> None:
    method = objective("lejepa")
    images = views(6)
    torch.manual_seed(0)
    first, second = (method(images, samples(6))["sigreg"] for _ in range(2))
    assert first != second


def test_gradient_reaches_the_centre() -> None:
    """No stop-gradient: the gradient of the prediction with respect to a whole view is that of the whole formula."""
    z = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: lejepa.prediction(x, x[:2]), z.requires_grad_())


def test_energy_is_the_mean_squared_distance_of_the_projections() -> None:
    method = objective("lejepa")
    step(method, 8)
    method.eval()
    assert method.projector[-1].bias is not None  # as that of torchvision's MLP, which MINIMAL.md uses
    x, y = views(5)
    expected = [
        sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / 5
        for u, v in zip(*projections(method, (x, y)), strict=True)
    ]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
