"""What several objectives are made of."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from darkmatter.parts import decoders, heads, masks, memory, multi_crop, noise_contrast, teacher

CPU = torch.device("cpu")


def test_prototypes_score_by_the_cosine_whatever_the_lengths() -> None:
    torch.manual_seed(0)
    prototypes = heads.Prototypes(4, 3)
    x = torch.randn(5, 4)
    expected = [[F.cosine_similarity(row, weight, dim=0).item() for weight in prototypes.weight] for row in x]
    torch.testing.assert_close(prototypes(x), torch.tensor(expected))
    torch.testing.assert_close(prototypes(7 * x), prototypes(x))


def test_an_exact_term_is_not_rounded_by_autocast() -> None:
    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    x, y = torch.randn(5, 7), torch.randn(7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = heads.exact(product)(x, y)
        assert product(x, y).dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, product(x, y), rtol=0, atol=0)


def test_a_teacher_follows_and_is_never_trained() -> None:
    student = nn.Linear(2, 2)
    copy = teacher.copy_of(student)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert student.weight.requires_grad
    before = copy.weight.clone()
    with torch.no_grad():
        student.weight.add_(1)
    teacher.follow(copy, student, 0.75)
    torch.testing.assert_close(copy.weight, before + 0.25)


def test_momentum_rises_along_a_cosine() -> None:
    assert [teacher.cosine_momentum(0.9, progress) for progress in (0, 0.5, 1)] == pytest.approx([0.9, 0.95, 1])


def test_queue_keeps_the_newest_rows() -> None:
    queue = memory.Queue(5, 2)
    random_start = queue.rows.clone()
    torch.testing.assert_close(random_start.norm(dim=1), torch.ones(5))
    rows = torch.arange(14.0).view(7, 2)
    queue.push(rows[:3])
    assert torch.equal(queue.rows, torch.cat([rows[:3], random_start[3:]]))
    queue.push(rows[3:])
    assert torch.equal(queue.rows, rows[[5, 6, 2, 3, 4]])
    assert queue.next == 2
    queue.push(torch.arange(100.0, 116).view(8, 2))  # more than it holds: the newest five
    assert sorted(queue.rows[:, 0].tolist()) == [106, 108, 110, 112, 114]


def test_bank_moves_only_the_rows_that_were_seen_and_keeps_their_length() -> None:
    bank = memory.Bank(6, 3)
    before = bank.rows.clone()
    new = F.normalize(torch.randn(2, 3), dim=1)
    bank.update(torch.tensor([4, 1]), new, 0.5)
    for row, value in ((4, new[0]), (1, new[1])):
        mixed = 0.5 * before[row] + 0.5 * value
        torch.testing.assert_close(bank.rows[row], mixed / mixed.norm())
    assert torch.equal(bank.rows[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_what_noise_contrast_remembers_of_a_step_it_takes_in_once() -> None:
    torch.manual_seed(0)
    memory_of = noise_contrast.Discrimination(6, 3)
    v, samples = F.normalize(torch.randn(2, 3), dim=1), torch.tensor([4, 1])
    first, second = memory_of.losses([v, v], samples, 4, 0.5)
    assert torch.equal(first, second)  # the same noise, the same constant
    memory_of.see(samples, v)
    memory_of.follow(0.5)
    once = memory_of.bank.rows.clone()
    assert memory_of.constant > 0
    memory_of.follow(0.5)
    assert torch.equal(memory_of.bank.rows, once)
    before = memory_of.constant.clone()
    memory_of.losses([-v], samples, 4, 0.5)
    memory_of.see(samples, v)
    memory_of.follow(0.5)
    assert torch.equal(memory_of.constant, before)  # that of the first step is kept


def test_views_of_a_size_go_through_a_network_together_and_keep_their_order() -> None:
    seen = []

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape))
            return x.mean((2, 3))

    views = [torch.rand(3, 2, size, size) for size in (8, 8, 4, 4, 4)]
    found = multi_crop.features(Network(), views)
    torch.testing.assert_close(found, torch.cat([view.mean((2, 3)) for view in views]))
    assert seen == [(6, 2, 8, 8), (9, 2, 4, 4)]


def test_random_orders_are_permutations_and_differ() -> None:
    torch.manual_seed(0)
    order = masks.random_order(4, 9, CPU)
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(4, -1))
    assert not torch.equal(order[0], order[1])


@pytest.mark.parametrize(("patches", "hidden"), [(49, 37), (16, 12), (16, 4), (49, 10)])
def test_fixed_orders_hide_every_patch_about_equally_often(patches: int, hidden: int) -> None:
    orders = masks.fixed_orders(patches, hidden, CPU)
    assert torch.equal(orders.sort(1).values, torch.arange(patches).expand(len(orders), -1))
    counts = torch.bincount(orders[:, -hidden:].flatten(), minlength=patches)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1
    assert torch.equal(orders, masks.fixed_orders(patches, hidden, CPU))


def test_blocks_cover_about_the_asked_share_in_rectangles() -> None:
    torch.manual_seed(0)
    hidden = masks.blocks(400, 14, (0.1, 0.5), CPU)
    share = hidden.float().mean(1)
    assert share.max() <= 0.5 + 1 / 196
    assert 0.2 < share.mean() < 0.3  # of 0.3 on average, some missing where no rectangle fitted
    maps = hidden.view(400, 14, 14)
    neighbours = (maps[:, :, 1:] & maps[:, :, :-1]).sum() / maps.sum()
    assert neighbours > 0.6  # scattered patches of this share would have about 0.3


def test_targets_are_rectangles_of_one_size_and_no_context_shows_them() -> None:
    torch.manual_seed(0)
    context, targets = masks.multi_block(40, 7, CPU)
    assert targets.shape[:2] == (4, 40)
    rows, columns = targets // 7, targets % 7
    tall, wide = rows.amax(2) - rows.amin(2) + 1, columns.amax(2) - columns.amin(2) + 1
    assert len(tall.unique()) == len(wide.unique()) == 1
    assert (tall * wide == targets.shape[2]).all()
    assert 5 <= targets.shape[2] <= 12  # 0.15 to 0.2 of 49 patches, rounded
    assert context.shape[1] >= 1
    shown = torch.zeros(40, 49, dtype=torch.bool).scatter(1, context, True)
    assert (shown.sum(1) == context.shape[1]).all()
    for image in range(40):
        assert not shown[image, targets[:, image].flatten()].any()


def test_patchify_cuts_in_raster_order() -> None:
    image = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    patches = decoders.patchify(image, 2)
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]  # upper right; channels last


def test_positions_are_all_different_and_rows_differ_from_columns() -> None:
    positions = decoders.sine_positions(7, 16)
    assert positions.shape == (49, 16)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(49)
    assert distances.min() > 0.1
    assert positions[8, 0].item() == pytest.approx(math.sin(1))  # second row, second column
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        decoders.sine_positions(3, 6)


def test_a_patch_predictor_depends_on_places_and_not_on_their_order() -> None:
    torch.manual_seed(0)
    predictor = decoders.PatchPredictor(5, 3, grid=3, width=8, depth=2, heads=2).eval()
    tokens, given, wanted = torch.randn(2, 4, 5), torch.tensor([[0, 2, 5, 7]] * 2), torch.tensor([[1, 8]] * 2)
    with torch.no_grad():
        out = predictor(tokens, given, wanted)
        assert out.shape == (2, 2, 3)
        turned = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(predictor(tokens[:, turned], given[:, turned], wanted), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predictor(tokens, given, wanted.flip(1)), out.flip(1), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(predictor(tokens, given.roll(1, 1), wanted), out)
        assert not torch.allclose(out[:, 0], out[:, 1])


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (30, 3), (8, 1), (7, 1), (96, 3)])
def test_image_decoder_makes_any_size(size: int, channels: int) -> None:
    decoder = decoders.ImageDecoder(5, channels=channels, image_size=size, width=4)
    assert decoder(torch.randn(2, 5)).shape == (2, channels, size, size)


def test_deviance_is_zero_at_the_pixels_themselves_and_positive_elsewhere() -> None:
    pixels = 0.1 + 0.8 * torch.rand(3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(decoders.deviance(pixels.logit(), pixels), torch.zeros(3, dtype=torch.float64))
    assert (decoders.deviance(pixels.logit() + 1, pixels) > 0.1).all()
    black = torch.zeros(1, 1, 4, 4)
    assert torch.isfinite(decoders.deviance(torch.full((1, 1, 4, 4), -20.0), black)).all()
