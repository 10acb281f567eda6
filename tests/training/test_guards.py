import copy
import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn
from toys import NAMES, objective, step, views

from darkmatter import health
from darkmatter.training import guards, optimizers

BAD = (float("nan"), float("inf"), float("-inf"))


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_no_trace_in_any_objective(name: str) -> None:
    """Images that are not finite reach the running statistics of batch norms, and they only."""
    method = objective(name)
    numbers = guards.Numbers(method)
    step(method, 8, seed=1)["loss"].backward()
    before = copy.deepcopy(method.state_dict())
    broken = [view.clone().fill_(float("nan")) for view in views(8, like=method)]
    numbers.before_step()
    torch.manual_seed(0)
    method(broken, torch.arange(8))
    assert not numbers.may_step(math.nan, 1.0, 5)
    assert same(method.state_dict(), before)
    assert numbers.not_finite == 1


def train(injections: dict[int, tuple[str, float]], steps: int = 30) -> tuple[nn.Module, guards.Numbers, list[dict]]:
    """SimCLR on random images; at the given steps a number is put into the loss or into one element of the gradient."""
    method = objective("simclr")
    optimizer, numbers, states = optimizers.build(method), guards.Numbers(method), []
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for number in range(steps):
        numbers.before_step()
        loss = step(method, 8, seed=number)["loss"]
        loss.backward()
        where, value = injections.get(number, ("", 0.0))
        told = value if where == "loss" else float(loss.detach())
        if where == "gradient":
            gradients = [p.grad for p in method.parameters() if p.grad is not None]
            gradients[number % len(gradients)].view(-1)[0] = value
        norm = guards.gradient_norm(method)
        if numbers.may_step(told, float(norm), number):
            guards.clip(method, norm, 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        states.append(copy.deepcopy({"model": method.state_dict(), "optimizer": optimizer.state_dict()}))
    return method, numbers, states


def test_twenty_numbers_that_are_not_finite_are_skipped_and_counted_and_none_gets_in() -> None:
    draws = random.Random(0)
    at = [number for number in range(1, 61) if number % 3]  # two in a row, never three
    injections = {number: (draws.choice(["loss", "gradient"]), draws.choice(BAD)) for number in draws.sample(at, 20)}
    _, numbers, states = train(injections, steps=61)
    assert numbers.not_finite == 20
    assert numbers.spikes == 0
    for number, (before, after) in enumerate(itertools.pairwise(states), start=1):
        guards.require_finite(after, number)
        assert same(before, after) == (number in injections)


def test_three_in_a_row_end_the_run() -> None:
    with pytest.raises(guards.NotFinite, match=r"step 12 is the last of 3 in a row skipped: the loss is nan"):
        train({10: ("gradient", math.inf), 11: ("loss", math.nan), 12: ("loss", math.nan)})


def test_a_gradient_that_leaps_is_skipped_and_a_change_that_stays_is_let_through() -> None:
    method = objective("simclr")
    numbers, draws = guards.Numbers(method), random.Random(0)
    assert all(numbers.may_step(1.0, draws.gauss(2.0, 0.1), step) for step in range(guards.WINDOW))
    assert numbers.may_step(1.0, 2.5, 128)
    assert not numbers.may_step(1.0, 30.0, 129)
    assert numbers.may_step(1.0, 2.1, 130)
    later = [numbers.may_step(1.0, draws.gauss(30.0, 0.1), step) for step in range(131, 150)]
    assert later == [False] * later.count(False) + [True] * later.count(True)
    assert 1 <= later.count(False) <= 5
    assert numbers.spikes == 1 + later.count(False)


def test_nothing_counts_as_a_leap_before_the_window_is_full() -> None:
    numbers = guards.Numbers(objective("simclr"))
    assert all(numbers.may_step(1.0, 10.0**step, step) for step in range(10))


def test_what_a_guard_knows_outlives_a_restart() -> None:
    method = objective("simclr")
    first, second = guards.Numbers(method), guards.Numbers(method)
    for number in range(200):
        first.may_step(1.0, 1 + number % 7, number)
    first.may_step(math.nan, 1.0, 200)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    answers = [[one.may_step(1.0, norm, 201) for norm in (3.0, 90.0, 3.0, 16.0)] for one in (first, second)]
    assert answers[0] == answers[1]
    assert same(first.state_dict(), second.state_dict())
    one, other = guards.Collapse(0.8), guards.Collapse(0.8)
    for number in range(3):
        one.look(0.5, number, method)
    other.load_state_dict(one.state_dict())
    with pytest.raises(health.Collapsed, match="collapse at step 3"):
        other.look(0.5, 3, method)


def test_clipping_shrinks_to_the_norm_and_zero_clips_nothing() -> None:
    method = nn.Linear(3, 2)
    for limit, expected in ((0.5, 0.5), (0.0, 10.0), (100.0, 10.0)):
        for parameter in method.parameters():
            parameter.grad = torch.full_like(parameter, 10 / 8**0.5)
        guards.clip(method, guards.gradient_norm(method), limit)
        assert float(guards.gradient_norm(method)) == pytest.approx(expected, rel=1e-4)
