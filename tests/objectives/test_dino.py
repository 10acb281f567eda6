import math

import pytest
import torch
from toys import objective, samples, step, views

from darkmatter.objectives import Objective, dino

SMALL = {"head": [8, 5], "prototypes": 7, "momentum": 0.8, "freeze": 0.1}
DIGITS = {"head": [8], "prototypes": 64, "momentum": 0.99, "centre_momentum": 0.5, "teacher_temperature": 0.04}
VIEWS = {"min_area": 0.9, "max_shift": 0.05, "max_degrees": 5.0, "max_shear": 0.1, "bend": 0.03, "min_contrast": 0.9}

Rows = list[list[float]]


def collapse(method: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without centring and with a teacher that is the student: one prototype wins everywhere (section 5.3 of DINO).

    Without centring alone the energy of a short run still tells images apart, by which of two prototypes wins.
    """
    method.config = method.config.model_copy(update={"centre_momentum": 1.0, "momentum": 0.0})


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def distance(teacher: list[float], student: list[float]) -> float:
    """H(a, b) = -a log b, equation 2."""
    return -sum(a * math.log(b) for a, b in zip(teacher, student, strict=True))


def entropy(row: list[float]) -> float:
    return distance(row, row)


def head(layers: torch.nn.Module, prototypes: torch.Tensor, x: torch.Tensor) -> Rows:
    """DINOHead of facebookresearch/dino, vision_transformer.py: the cosines of its bottleneck and the prototypes."""
    unit = [row / row.square().sum().sqrt() for row in layers(x)]
    directions = [row / row.square().sum().sqrt() for row in prototypes]
    return [[(u * v).sum().item() for v in directions] for u in unit]


def teacher_scores(method: dino.DINO, x: torch.Tensor) -> Rows:
    return head(method.head.teacher.layers, method.head.teacher.prototypes.weight, method.backbone(x))


def student_scores(method: dino.DINO, x: torch.Tensor) -> Rows:
    return head(method.head.student.layers, method.head.student.prototypes.weight, method.student(x))


def targets_by_the_paper(scores: Rows, centre: list[float], temperature: float) -> Rows:
    centred = [[value - mean for value, mean in zip(row, centre, strict=True)] for row in scores]
    return [softmax(row, temperature) for row in centred]


def mean_row(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def method_in_training(progress: float) -> dino.DINO:
    """A teacher that is not the student, a centre that is not zero."""
    method = objective("dino", teacher_temperature=0.09, warmup=0.4)
    for parameter in (*method.student.parameters(), *method.head.student.parameters()):
        torch.nn.init.normal_(parameter)
    step(method, 8, seed=3)
    method.after_step(progress)
    assert method.head.centre.any()
    return method


@pytest.mark.parametrize(
    ("number", "progress", "temperature"), [(2, 0.0, 0.04), (4, 0.1, 0.04 + 0.05 / 4), (4, 0.4, 0.09), (2, 1.0, 0.09)]
)
def test_loss_is_equation_3_with_the_teacher_of_the_moment(number: int, progress: float, temperature: float) -> None:
    """Caron et al. 2021, equation 3, averaged as DINOLoss in main_dino.py; the temperature as in section 3.2."""
    method = method_in_training(progress)
    images = views(6, seed=5, like=method)[:number]
    whole, local = torch.cat(images[:2]), images[2:]
    rows = targets_by_the_paper(teacher_scores(method, whole), method.head.centre.tolist(), temperature)
    predictions = [student_scores(method, whole), student_scores(method, torch.cat(local)) if local else []]
    students = [softmax(row, 0.1) for part in predictions for row in part]
    pairs = [(teacher, student) for teacher in range(2) for student in range(number) if teacher != student]
    expected = sum(
        distance(rows[6 * teacher + sample], students[6 * student + sample]) / 6 / len(pairs)
        for teacher, student in pairs
        for sample in range(6)
    )
    terms = method(images, samples(6))
    found = [terms[name].item() for name in ("loss", "cross_entropy", "teacher_entropy", "entropy_of_mean_teacher")]
    mean_entropy = sum(map(entropy, rows)) / 12
    assert found == pytest.approx([expected, expected, mean_entropy, entropy(mean_row(rows))], abs=1e-9)


def test_centre_is_a_running_mean_of_the_teacher_s_scores() -> None:
    """Equation 4."""
    method = objective("dino", centre_momentum=0.7)
    expected = [0.0] * 7
    for number in range(3):
        scores = teacher_scores(method, torch.cat(views(8, seed=number, like=method)[:2]))
        step(method, 8, seed=number)
        assert method.head.centre.tolist() == pytest.approx(expected, abs=1e-9)  # changes after the step, not in it
        method.after_step(0.1 * number)
        expected = [0.7 * old + 0.3 * new for old, new in zip(expected, mean_row(scores), strict=True)]
        assert method.head.centre.tolist() == pytest.approx(expected, abs=1e-9)
    method.after_step(0.5)  # nothing new was seen
    assert method.head.centre.tolist() == pytest.approx(expected, abs=1e-9)


def test_backbone_is_a_teacher_that_follows_the_student_with_a_rising_momentum() -> None:
    method = objective("dino")
    networks = [(method.backbone, method.student), (method.head.teacher, method.head.student)]
    before = [[p.clone() for p in teacher.parameters()] for teacher, _ in networks]
    for _, student in networks:
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter)
    method.after_step(0.25)
    momentum = 1 - 0.2 * (math.cos(math.pi * 0.25) + 1) / 2  # section 3.1
    for (teacher, student), olds in zip(networks, before, strict=True):
        for new, old, theirs in zip(teacher.parameters(), olds, student.parameters(), strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * theirs, rtol=0, atol=1e-12)


def test_prototypes_are_frozen_at_the_start_and_the_rest_is_not() -> None:
    method = objective("dino")
    for progress, moves in [(0.05, False), (0.1, True)]:
        method.zero_grad()
        method.after_step(progress)
        step(method, 8)["loss"].backward()
        assert bool(method.head.student.prototypes.weight.grad.any()) == moves
        assert method.head.student.layers[0].weight.grad.any()
        assert method.student.network.layers[0].weight.grad.any()


def test_energy_is_the_cross_entropy_of_teacher_and_student() -> None:
    method = method_in_training(0.2).eval()
    x, y = views(5)
    teacher = targets_by_the_paper(teacher_scores(method, y), method.head.centre.tolist(), 0.065)
    student = [softmax(row, 0.1) for row in student_scores(method, x)]
    assert method.energy(x, y).tolist() == pytest.approx(list(map(distance, teacher, student)), abs=1e-9)
