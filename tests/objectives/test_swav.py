import math

import pytest
import torch
from toys import objective, samples, step, views

from darkmatter.objectives import swav

SMALL = {"projector": [8, 5], "prototypes": 6, "queue": 16, "queue_from": 0.3, "freeze": 0.1}
DIGITS = {"projector": [64, 32], "prototypes": 64, "temperature": 0.2}

Rows = list[list[float]]


def collapse(method: swav.SwAV, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the balance of the codes: each view takes the codes of the other as they come."""
    monkeypatch.setattr(swav, "sinkhorn", lambda scores, epsilon, iterations: (scores / epsilon).softmax(1))


def dot(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def unit(u: list[float]) -> list[float]:
    return [a / math.sqrt(dot(u, u)) for a in u]


def embeddings(method: swav.SwAV, images: tuple[torch.Tensor, ...]) -> list[Rows]:
    """Of each view; resnet50.py of facebookresearch/swav: the backbone once for each size, the projector once for all."""
    parts = [torch.cat(images[:2]), *([torch.cat(images[2:])] if images[2:] else [])]
    z = method.projector(torch.cat([method.backbone(part) for part in parts]))
    return [[unit(row) for row in view.tolist()] for view in z.chunk(len(images))]


def scores(method: swav.SwAV, rows: Rows) -> Rows:
    prototypes = [unit(row) for row in method.prototypes.weight.tolist()]
    return [[dot(row, prototype) for prototype in prototypes] for row in rows]


def codes_by_the_authors(out: Rows, epsilon: float = 0.05, iterations: int = 3) -> Rows:
    """distributed_sinkhorn of facebookresearch/swav, main_swav.py, in plain Python."""
    b, k = len(out), len(out[0])
    q = [[math.exp(value / epsilon) for value in row] for row in out]
    whole = sum(map(sum, q))
    q = [[value / whole for value in row] for row in q]
    for _ in range(iterations):
        column = [sum(row[j] for row in q) for j in range(k)]
        q = [[row[j] / column[j] / k for j in range(k)] for row in q]
        q = [[value / sum(row) / b for value in row] for row in q]
    return [[value * b for value in row] for row in q]


def log_softmax(row: list[float], temperature: float) -> list[float]:
    norm = math.log(sum(math.exp(value / temperature) for value in row))
    return [value / temperature - norm for value in row]


def loss_by_the_paper(method: swav.SwAV, z: list[Rows], queues: list[Rows]) -> float:
    """Caron et al. 2020, equations 2 and 6, averaged as in main_swav.py: over the other views, then the whole ones."""
    loss = 0.0
    for whole in (0, 1):
        batch = len(z[whole])
        q = codes_by_the_authors(scores(method, queues[whole] + z[whole]))[-batch:]
        others = [view for view in range(len(z)) if view != whole]
        for other in others:
            p = [log_softmax(row, 0.1) for row in scores(method, z[other])]
            loss -= sum(map(dot, q, p)) / batch / len(others) / 2
    return loss


@pytest.mark.parametrize("number", [2, 4])
def test_loss_is_equation_6_over_whole_and_smaller_views(number: int) -> None:
    method = objective("swav")
    images = views(6, like=method)[:number]
    expected = loss_by_the_paper(method, embeddings(method, images), [[], []])
    terms = method(images, samples(6))
    assert [terms["loss"].item(), terms["swapped_prediction"].item()] == pytest.approx([expected] * 2, abs=1e-9)


def test_codes_are_the_authors_and_use_all_prototypes_equally() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(12, 4, dtype=torch.float64, generator=generator) * 2 - 1
    expected = codes_by_the_authors(cosines.tolist(), epsilon=0.2, iterations=2)
    torch.testing.assert_close(
        swav.sinkhorn(cosines, 0.2, 2), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
    )
    codes = swav.sinkhorn(cosines, 0.5, 50)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.isfinite(swav.sinkhorn(cosines.float(), 0.001, 3)).all()


def test_queue_holds_each_whole_view_of_earlier_steps_and_is_used_from_its_time_on_once_full() -> None:
    method = objective("swav")  # a queue of 16 rows, used from 0.3 on
    remembered: list[Rows] = [[], []]
    for number, progress in enumerate([0.1, 0.2, 0.5, 0.6]):
        images = views(8, seed=number, like=method)
        z = embeddings(method, images)
        used = [rows[-16:] if number == 3 else [] for rows in remembered]  # full after 2 steps, but it is too early
        torch.manual_seed(number)
        assert method(images, samples(8))["loss"].item() == pytest.approx(
            loss_by_the_paper(method, z, used), abs=1e-9
        ), number
        method.after_step(progress)
        remembered = [rows + new for rows, new in zip(remembered, z, strict=False)]
        both = [u + v for u, v in zip(*remembered, strict=True)][-16:]
        held = sorted(row for row in method.queue.rows.tolist() if any(row))
        torch.testing.assert_close(torch.tensor(held), torch.tensor(sorted(both)), rtol=0, atol=1e-9)


def test_queue_that_is_not_full_is_not_used() -> None:
    method = objective("swav")
    step(method, 8)
    method.after_step(0.9)
    images = views(8, seed=2, like=method)
    expected = loss_by_the_paper(method, embeddings(method, images), [[], []])
    assert method(images, samples(8))["loss"].item() == pytest.approx(expected, abs=1e-9)


def test_a_step_without_a_loss_leaves_the_queue_alone() -> None:
    method = objective("swav")
    step(method, 8)
    method.after_step(0.1)
    before = method.queue.rows.clone()
    method.after_step(0.2)
    assert torch.equal(method.queue.rows, before)


def test_prototypes_are_frozen_at_the_start_and_the_rest_is_not() -> None:
    method = objective("swav")
    for progress, moves in [(0.05, False), (0.1, True), (0.5, True)]:
        method.zero_grad()
        method.after_step(progress)
        step(method, 8)["loss"].backward()
        assert bool(method.prototypes.weight.grad.any()) == moves
        assert method.projector[0].weight.grad.any()


def test_energy_is_the_least_over_codes_that_both_views_share() -> None:
    method = objective("swav").eval()
    x, y = views(5)
    p, q = ([log_softmax(row, 0.1) for row in scores(method, embeddings(method, (view,))[0])] for view in (x, y))
    expected = [min(-a - b for a, b in zip(u, v, strict=True)) for u, v in zip(p, q, strict=True)]
    assert method.energy(x, y).tolist() == pytest.approx(expected, abs=1e-9)
