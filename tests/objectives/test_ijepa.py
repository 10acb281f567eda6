import math

import pytest
import torch
from toys import objective, samples, step, views

from darkmatter.objectives import ijepa
from darkmatter.params import ParamsError
from darkmatter.parts import masks

SMALL = {"predictor_width": 8, "predictor_depth": 1, "predictor_heads": 2}
DIGITS = {"predictor_width": 256, "predictor_depth": 2, "predictor_heads": 4, "momentum": 0.99}
VIEWS = {
    "max_shift": 0.03, "bend": 0.0, "max_degrees": 3.0, "max_shear": 0.03, "min_area": 0.95, "min_contrast": 0.9
}  # fmt: skip


def collapse(method: ijepa.IJEPA, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is the student, with a gradient: both sides go to where every feature is the same."""
    method.backbone = method.student
    monkeypatch.setattr(ijepa.IJEPA, "_features", ijepa.IJEPA._features.__wrapped__)


def layer_normed(token: list[float]) -> list[float]:
    """src/train.py: F.layer_norm over the features, without scale and shift."""
    mean = sum(token) / len(token)
    variance = sum((value - mean) ** 2 for value in token) / len(token)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in token]


def smooth_l1(a: float, b: float) -> float:
    """src/train.py: F.smooth_l1_loss with its default beta of 1."""
    return (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def error_by_the_code(
    method: ijepa.IJEPA, x: torch.Tensor, y: torch.Tensor, context: list[int], blocks: list[list[int]], row: int
) -> float:
    """Of one image and one mask: the student sees the patches of the context alone, the predictor tells each block."""
    hidden = torch.ones(16, dtype=torch.float64)
    hidden[context] = 0
    hidden = hidden.view(1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    mean, std = method.student.mean.item(), method.student.std.item()
    maps = method.student.network.forward_features((x * (1 - hidden) + mean * hidden - mean) / std)
    predicted = method.predictor.predictor(maps)[row].flatten(1).T.tolist()
    target = method.backbone.network.forward_features((y - mean) / std)[row].flatten(1).T.tolist()
    values = [
        smooth_l1(a, b)
        for block in blocks
        for place in block
        for a, b in zip(predicted[place], layer_normed(target[place]), strict=True)
    ]
    return sum(values) / len(values)


def moved() -> ijepa.IJEPA:
    """With a teacher that is not the student, statistics that are not the first, and some differences above 1."""
    method = objective("ijepa")
    step(method, 8)
    for parameter in method.backbone.parameters():
        parameter.mul_(1.2).add_(0.02)
    return method


def test_loss_is_the_smooth_l1_distance_of_predictions_to_layer_normed_features_of_the_teacher() -> None:
    """Assran et al. 2023, section 3, with the distance of src/train.py. In eval mode, where images do not see each other."""
    method, (x,) = moved().eval(), views(6, like=objective("ijepa"))
    torch.manual_seed(5)
    context, blocks = masks.multi_block(6, 4, torch.device("cpu"))
    expected = [
        error_by_the_code(
            method, x[row : row + 1], x[row : row + 1], context[row].tolist(), blocks[:, row].tolist(), row=0
        )
        for row in range(6)
    ]
    torch.manual_seed(5)
    terms = method((x,), samples(6))
    assert terms["loss"].item() == pytest.approx(sum(expected) / 6, abs=1e-9)
    assert terms["prediction"].item() == terms["loss"].item()


def test_distance_is_square_below_1_and_linear_above() -> None:
    prediction = torch.tensor([0.0, 0.5, 1.0, -3.0], dtype=torch.float64).view(1, 1, 1, 4)
    found = ijepa.distance(prediction, torch.zeros_like(prediction))
    assert found.tolist() == [(0.0 + 0.125 + 0.5 + 2.5) / 4]


def test_energy_is_the_distance_over_fixed_masks_from_the_context_of_x_to_the_targets_of_y() -> None:
    method, (x, y) = moved().eval(), views(3)
    context, blocks = masks.fixed_multi_blocks(4, 4, torch.device("cpu"))
    expected = [
        sum(error_by_the_code(method, x, y, context[mask].tolist(), blocks[:, mask].tolist(), row) for mask in range(4))
        / 4
        for row in range(3)
    ]
    torch.manual_seed(1)
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1)), "it took a random number"


def test_the_teacher_is_the_average_of_the_student_with_a_momentum_that_rises_linearly() -> None:
    """src/train.py, momentum_scheduler. The teacher is the backbone that downstream teams get."""
    method = objective("ijepa", momentum=0.8)
    before = [p.clone() for p in method.backbone.parameters()]
    for parameter in method.student.parameters():
        torch.nn.init.normal_(parameter)
    method.after_step(0.25)
    for new, old, theirs in zip(method.backbone.parameters(), before, method.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.85 * old + 0.15 * theirs, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for p in method.backbone.parameters())


def test_training_sees_other_masks_at_every_step() -> None:
    method, images = moved().eval(), views(6, like=objective("ijepa"))
    torch.manual_seed(0)
    assert len({method(images, samples(6))["loss"].item() for _ in range(4)}) == 4


@pytest.mark.parametrize("grid", [3, 4, 7, 14])
def test_masks_are_rectangles_of_one_size_and_contexts_without_them(grid: int) -> None:
    """src/masks/multiblock.py: scale and aspect ratio of the targets come from one random number."""
    corners = set()
    for seed in range(30):
        torch.manual_seed(seed)
        context, blocks = masks.multi_block(16, grid, torch.device("cpu"))
        assert blocks.shape[:2] == (4, 16)
        assert context.shape[1] >= 1
        torch.manual_seed(seed)
        number = torch.rand(2)[0].item()
        area = int(grid * grid * (0.15 + 0.05 * number))
        aspect = 0.75 + 0.75 * number
        height, width = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        for image in range(16):
            visible = context[image].tolist()
            assert visible == sorted(set(visible))
            for block in blocks[:, image].tolist():
                top, left = divmod(block[0], grid)
                rectangle = [(top + i) * grid + left + j for i in range(height) for j in range(width)]
                assert block == rectangle
                assert left + width <= grid and top + height <= grid
                corners |= {block[0], block[-1]}
            hidden = set(blocks[:, image].flatten().tolist())
            if len(hidden) < grid * grid:
                assert not hidden & set(visible)
    assert {0, grid * grid - 1} <= corners, "a rectangle may touch every edge"


def test_the_context_is_a_large_square_cut_to_the_smallest_of_the_batch() -> None:
    smallest, largest = 196, 0
    for seed in range(30):
        torch.manual_seed(seed)
        context, blocks = masks.multi_block(1, 14, torch.device("cpu"))
        torch.manual_seed(seed)
        side = round(math.sqrt(int(196 * (0.85 + 0.15 * torch.rand(2)[1].item()))))
        rows, columns = context[0] // 14, context[0] % 14
        assert rows.max() - rows.min() < side and columns.max() - columns.min() < side
        free = set(range(196)) - set(blocks.flatten().tolist())
        assert len(free) - (196 - side * side) <= context.shape[1] <= len(free)
        smallest, largest = min(smallest, context.shape[1]), max(largest, context.shape[1])
    assert smallest < largest


def test_a_context_that_would_be_empty_overlaps_the_last_targets() -> None:
    contexts = []
    for seed in range(300):
        torch.manual_seed(seed)
        context, blocks = masks.multi_block(32, 4, torch.device("cpu"))
        full = [image for image in range(32) if len(set(blocks[:, image].flatten().tolist())) == 16]
        contexts += [(context[image], blocks[0, image]) for image in full]
    assert contexts
    for context, first in contexts:
        assert len(context) >= 1
        assert not set(context.tolist()) & set(first.tolist())


def test_no_context_is_empty_even_where_the_targets_can_cover_its_square() -> None:
    """Of 7 x 7 patches four targets of 4 x 3 can cover a square of 6 x 6; the context is all that they leave then."""
    for seed in range(10_000):
        torch.manual_seed(seed)
        first, second = torch.rand(2).tolist()
        area, aspect = int(49 * (0.15 + 0.05 * first)), 0.75 + 0.75 * first
        target = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if target == (4, 3) and round(math.sqrt(int(49 * (0.85 + 0.15 * second)))) == 6:
            break
    torch.manual_seed(seed)
    context, blocks = masks.multi_block(20_000, 7, torch.device("cpu"))
    assert blocks.shape[2] == 12
    assert context.shape[1] >= 1
    hidden = torch.zeros(20_000, 49, dtype=torch.bool).scatter(1, blocks.transpose(0, 1).flatten(1), True)
    assert not hidden.gather(1, context).any()


def test_too_few_patches_are_refused() -> None:
    method = objective("ijepa")
    method.student.grid = 2
    with pytest.raises(ParamsError, match="at least 9"):
        ijepa.build(ijepa.Config(), method.student, 24)
