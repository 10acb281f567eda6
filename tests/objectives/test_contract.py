"""The energy contract, for every objective there is."""

import copy
import typing

import pytest
import torch
from toys import NAMES, objective, source_names_paper, views

from darkmatter.objectives import Mechanism


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_energy_is_a_number_a_pair_and_no_pair_affects_another(name: str) -> None:
    method = objective(name).eval()
    x, y = views(7)
    energy = method.energy(x, y)
    assert energy.shape == (7,)
    for index in range(7):
        torch.testing.assert_close(method.energy(x[index : index + 1], y[index : index + 1]), energy[index : index + 1])


def test_energy_of_equal_images_is_the_lowest(name: str) -> None:
    """True of every energy that compares embeddings; one that predicts or reconstructs will say so here."""
    method = objective(name).eval()
    x, y = views(7)
    same = method.energy(x, x)
    assert (same <= method.energy(x, y) + 1e-12).all()
    assert (same <= method.energy(x, y.roll(1, 0)) + 1e-12).all()


def test_loss_names_its_terms_and_reaches_every_parameter(name: str) -> None:
    method = objective(name)
    terms = method(views(8))
    assert "loss" in terms
    assert len(terms) > 1
    for term in terms.values():
        assert term.shape == ()
        assert torch.isfinite(term)
    assert [key for key, term in terms.items() if term.requires_grad] == ["loss"]
    terms["loss"].backward()
    for parameter_name, parameter in method.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_embedding_is_the_backbone_s(name: str) -> None:
    method = objective(name).eval()
    x, _ = views(4)
    assert torch.equal(method.embed(x), method.backbone(x))
    assert method.embed(x).shape == (4, 6)


def test_state_dict_holds_all_that_affects_numbers(name: str) -> None:
    """Three steps, saved; a fresh one that loads them goes on with the same losses, bit for bit."""

    def train(method: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            loss = method(views(8, seed=step))["loss"]
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(step / 8)
        return losses

    first = objective(name)
    optimizer = torch.optim.Adam(first.parameters(), 1e-2)
    train(first, optimizer, range(3))
    second = objective(name, seed=99)
    second.load_state_dict(first.state_dict())
    other = torch.optim.Adam(second.parameters(), 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors otherwise
    assert train(second, other, range(3, 8)) == train(first, optimizer, range(3, 8))


def test_bfloat16_autocast_gives_finite_float32_losses_and_gradients(name: str) -> None:
    method = objective(name).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method([view.float() for view in views(8)])["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in method.parameters())


def test_energy_margin_rises_by_training(name: str) -> None:
    """What the loss lowers is what the energy measures."""
    from darkmatter import health

    method = objective(name)
    held_out = views(64, seed=1000)
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)

    def margin() -> float:
        return health.auroc(*health.pair_energies(method, *held_out))

    before = margin()
    for step in range(150):
        method(views(32, seed=step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert margin() > max(0.9, before)


def test_objective_says_what_it_is(name: str) -> None:
    method = objective(name)
    assert method.against_collapse in typing.get_args(Mechanism)
    assert source_names_paper(name), f"the docstring of objectives/{name}.py must name the paper and the authors' code"
