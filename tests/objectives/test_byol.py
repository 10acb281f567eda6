import math

import pytest
import torch
from toys import objective, samples, views

from darkmatter.objectives import byol

SMALL = {"projector": [8, 5], "predictor": 7}
DIGITS = {"projector": [128, 128], "predictor": 256, "momentum": 0.5}
VIEWS = {"max_shift": 0.1, "bend": 0.05, "max_degrees": 10.0, "max_shear": 0.15}


def collapse(method: byol.BYOL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the predictor, and with a teacher that is the student: nothing is asymmetric but the gradient."""
    method.predictor = torch.nn.Identity()
    method.momentum = 0.0


def regression_loss(x: list[float], y: list[float]) -> float:
    """Grill et al. 2020, equation 2, as in deepmind-research/byol/utils/helpers.py: |x / |x| - y / |y||^2."""
    norm_x, norm_y = (math.sqrt(sum(value * value for value in vector)) for vector in (x, y))
    return sum((a / norm_x - b / norm_y) ** 2 for a, b in zip(x, y, strict=True))


def test_loss_is_equation_2_both_ways_round() -> None:
    method = objective("byol")
    for parameter in method.teacher.parameters():  # a teacher that is not the student
        parameter.mul_(1.1).add_(0.01)
    x, y = views(6)
    online = [method.predictor(method.projector(method.backbone(view))).tolist() for view in (x, y)]
    target = [method.teacher(view).tolist() for view in (x, y)]
    there = sum(map(regression_loss, online[0], target[1])) / 6
    back = sum(map(regression_loss, online[1], target[0])) / 6
    terms = method((x, y), samples(6))
    found = [terms[name].item() for name in ("there", "back", "loss")]
    assert found == pytest.approx([there, back, there + back], abs=1e-9)


def test_energy_is_the_distance_from_prediction_to_target() -> None:
    method = objective("byol").eval()
    x, y = views(5)
    prediction, target = method.predictor(method.projector(method.backbone(x))), method.teacher(y)
    assert method.energy(x, y).tolist() == pytest.approx(
        list(map(regression_loss, prediction.tolist(), target.tolist())), abs=1e-9
    )


def test_the_teacher_is_the_average_of_the_student_with_a_rising_momentum() -> None:
    method = objective("byol", momentum=0.8)
    before = [p.clone() for p in method.teacher.parameters()]
    for parameter in (*method.backbone.parameters(), *method.projector.parameters()):
        torch.nn.init.normal_(parameter)
    student = [p.clone() for p in (*method.backbone.parameters(), *method.projector.parameters())]
    method.after_step(0.25)
    momentum = 1 - 0.2 * (math.cos(math.pi * 0.25) + 1) / 2  # section 3.2
    for new, old, theirs in zip(method.teacher.parameters(), before, student, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * theirs, rtol=0, atol=1e-12)
