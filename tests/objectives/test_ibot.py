import math

import pytest
import torch
from test_dino import DIGITS as DIGITS
from test_dino import VIEWS as VIEWS
from test_dino import Rows, distance, mean_row, softmax, targets_by_the_paper
from test_dino import collapse as collapse
from toys import NUM_SAMPLES, Toy, objective, samples, step, views

from darkmatter.backbones import Backbone
from darkmatter.objectives import ibot
from darkmatter.params import ParamsError
from darkmatter.parts import masks

SMALL = {"head": [8, 5], "prototypes": 7, "momentum": 0.8, "freeze": 0.1, "koleo": 0.1}


def scores(head: torch.nn.Module, x: torch.Tensor) -> Rows:
    """models/head.py of bytedance/ibot: the cosines of the bottleneck and the prototypes."""
    unit = [row / row.square().sum().sqrt() for row in head.layers(x)]
    directions = [row / row.square().sum().sqrt() for row in head.prototypes.weight]
    return [[(u * v).sum().item() for v in directions] for u in unit]


def koleo_by_the_paper(rows: Rows) -> float:
    """Sablayrolles et al. 2019, as KoLeoLoss in dinov2/loss/koleo_loss.py; its epsilons are below 1e-8."""
    unit = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]
    nearest = [min(math.dist(a, b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return -sum(map(math.log, nearest)) / len(rows)


def method_in_training(progress: float, **options: float) -> ibot.IBOT:
    """A teacher that is not the student, centres that are not zero."""
    changed = {"teacher_temperature": 0.09, "patch_teacher_temperature": 0.06, "warmup": 0.4, **options}
    method = objective("ibot", **changed)
    for module in (method.student, method.head.student, method.patch_head.student):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    step(method, 8, seed=3)
    method.after_step(progress)
    assert method.head.centre.any() and method.patch_head.centre.any()
    return method


def hidden_patches(seed: int, batch: int) -> torch.Tensor:
    """What the loss draws after this seed: for each whole view which images, and in those which patches."""
    torch.manual_seed(seed)
    drawn = []
    for _ in range(2):
        chosen = torch.rand(batch) < 0.5
        drawn.append(masks.blocks(batch, 4, (0.1, 0.5), torch.device("cpu")) & chosen[:, None])
    return torch.cat(drawn)


@pytest.mark.parametrize(("number", "progress", "warm"), [(2, 0.0, 0.0), (4, 0.1, 0.25), (4, 0.4, 1.0), (2, 1.0, 1.0)])
def test_loss_is_dinos_and_that_of_hidden_patches(number: int, progress: float, warm: float) -> None:
    """Zhou et al. 2022, section 3.1, averaged as iBOTLoss in main_ibot.py; weights that are not the default."""
    batch = 6
    method = method_in_training(progress, lambda1=2.0, lambda2=3.0, koleo=0.5)
    images = views(batch, seed=5, like=method)[:number]
    whole, local = torch.cat(images[:2]), images[2:]
    hidden = hidden_patches(11, batch)
    assert hidden.any() and not hidden.any(1).all()
    painted = whole.clone()
    for image, row in zip(painted, hidden.view(-1, 4, 4), strict=True):
        for i in range(4):
            for j in range(4):
                if row[i, j]:
                    image[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = method.backbone.mean.item()

    pooled, tokens = method.backbone.both(whole)
    teacher = targets_by_the_paper(scores(method.head.teacher, pooled), method.head.centre.tolist(), 0.04 + 0.05 * warm)
    patch_scores = scores(method.patch_head.teacher, tokens.flatten(0, 1))
    patch_teacher = targets_by_the_paper(patch_scores, method.patch_head.centre.tolist(), 0.04 + 0.02 * warm)
    pooled, tokens = method.student.both(painted)
    rows = scores(method.head.student, pooled) + (
        scores(method.head.student, method.student(torch.cat(local))) if local else []
    )
    student = [softmax(row, 0.1) for row in rows]
    patch_student = [softmax(row, 0.1) for row in scores(method.patch_head.student, tokens.flatten(0, 1))]

    pairs = [(a, b) for a in range(2) for b in range(number) if a != b]
    cls = sum(distance(teacher[batch * a + i], student[batch * b + i]) for a, b in pairs for i in range(batch))
    mim = 0.0
    for index, row in enumerate(hidden.tolist()):
        places = [16 * index + place for place, is_hidden in enumerate(row) if is_hidden]
        mim += sum(distance(patch_teacher[place], patch_student[place]) for place in places) / max(1, len(places))
    cls, mim = cls / batch / len(pairs), mim / (2 * batch)
    spread = sum(koleo_by_the_paper(view.tolist()) for view in pooled.chunk(2))
    entropies = [distance(row, row) for row in teacher]

    torch.manual_seed(11)
    terms = method(images, samples(batch))
    names = ["cls", "mim", "teacher_entropy", "entropy_of_mean_teacher"]
    mean = mean_row(teacher)
    assert [terms[name].item() for name in names] == pytest.approx(
        [cls, mim, sum(entropies) / len(entropies), distance(mean, mean)], abs=1e-9
    )
    assert terms["koleo"].item() == pytest.approx(spread, abs=1e-6)
    assert terms["loss"].item() == pytest.approx(2 * cls + 3 * mim + 0.5 * terms["koleo"].item(), abs=1e-9)


def test_koleo_is_the_log_distance_to_the_nearest_neighbour() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    assert ibot.koleo(features).item() == pytest.approx(koleo_by_the_paper(features.tolist()), abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert ibot.koleo(opposite).item() == pytest.approx(-math.log(2), abs=1e-6)
    same = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    ibot.koleo(same).backward()
    assert torch.isfinite(same.grad).all()


def test_ibot_itself_has_no_koleo() -> None:
    assert "koleo" not in step(objective("ibot", koleo=ibot.Config().koleo), 8)


def test_as_many_images_have_hidden_patches_as_is_asked_for() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1000, 1, 8, 8, dtype=torch.float64)
    hidden = objective("ibot", masked_images=0.3, mask_share=[0.25, 0.4])._hide(image)
    assert hidden.any(1).double().mean().item() == pytest.approx(0.3, abs=0.05)
    assert 0.2 < hidden[hidden.any(1)].double().mean().item() < 0.4


def test_both_centres_are_running_means_of_the_teachers_scores() -> None:
    """iBOTLoss.update_center in main_ibot.py."""
    method = objective("ibot", centre_momentum=0.7)
    expected = [[0.0] * 7, [0.0] * 7]
    for number in range(3):
        pooled, tokens = method.backbone.both(torch.cat(views(8, seed=number, like=method)[:2]))
        new = [scores(method.head.teacher, pooled), scores(method.patch_head.teacher, tokens.flatten(0, 1))]
        step(method, 8, seed=number)
        method.after_step(0.1 * number)
        expected = [
            [0.7 * a + 0.3 * b for a, b in zip(old, mean_row(rows), strict=True)]
            for old, rows in zip(expected, new, strict=True)
        ]
        for centre, values in zip((method.head.centre, method.patch_head.centre), expected, strict=True):
            assert centre.tolist() == pytest.approx(values, abs=1e-9)


def test_backbone_is_a_teacher_that_follows_the_student_with_a_rising_momentum() -> None:
    method = objective("ibot")
    networks = [
        (method.backbone, method.student),
        (method.head.teacher, method.head.student),
        (method.patch_head.teacher, method.patch_head.student),
    ]
    before = [[p.clone() for p in teacher.parameters()] for teacher, _ in networks]
    for _, student in networks:
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter)
    method.after_step(0.25)
    momentum = 1 - 0.2 * (math.cos(math.pi * 0.25) + 1) / 2
    for (teacher, student), olds in zip(networks, before, strict=True):
        for new, old, theirs in zip(teacher.parameters(), olds, student.parameters(), strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * theirs, rtol=0, atol=1e-12)


def test_prototypes_of_both_heads_are_frozen_at_the_start_and_the_rest_is_not() -> None:
    method = objective("ibot")
    for progress, moves in [(0.05, False), (0.1, True)]:
        method.zero_grad()
        method.after_step(progress)
        step(method, 8)["loss"].backward()
        for head in (method.head.student, method.patch_head.student):
            assert bool(head.prototypes.weight.grad.any()) == moves
            assert head.layers[0].weight.grad.any()


def test_energy_is_the_cross_entropy_of_teacher_and_student() -> None:
    method = method_in_training(0.2).eval()
    x, y = views(5)
    teacher = targets_by_the_paper(scores(method.head.teacher, method.backbone(y)), method.head.centre.tolist(), 0.065)
    student = [softmax(row, 0.1) for row in scores(method.head.student, method.student(x))]
    assert method.energy(x, y).tolist() == pytest.approx(list(map(distance, teacher, student)), abs=1e-9)


def test_a_backbone_without_patches_is_refused() -> None:
    class Flat(Toy):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward_features(x).mean((2, 3), keepdim=True)

    backbone = Backbone(Flat(), mean=[0.4], std=[0.3], image_size=8)
    with pytest.raises(ParamsError, match="patches"):
        ibot.build(ibot.Config(**SMALL), backbone, NUM_SAMPLES)
