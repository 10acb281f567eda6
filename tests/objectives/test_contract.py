"""The energy contract, for every objective there is."""

import copy
import typing
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from toys import NAMES, objective, samples, source_names_paper, step, views

from darkmatter.objectives import Mechanism, Objective


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_energy_is_a_number_a_pair_and_no_pair_affects_another(name: str) -> None:
    method = objective(name).eval()
    x, y = views(7)
    energy = method.energy(x, y)
    assert energy.shape == (7,)
    assert torch.isfinite(energy).all()
    for index in range(7):
        alone = method.energy(x[index : index + 1], y[index : index + 1])
        torch.testing.assert_close(alone, energy[index : index + 1], rtol=1e-9, atol=1e-12)
    assert torch.equal(method.energy(x, y), energy), "the same pairs, another energy: it draws random numbers"


def test_energy_depends_on_both_images(name: str) -> None:
    method = objective(name).eval()
    x, y = views(7)
    energy = method.energy(x, y)
    # Most, not all: codes are discrete, and two images may have the same.
    assert torch.isclose(method.energy(x.roll(1, 0), y), energy).sum() <= 3
    assert torch.isclose(method.energy(x, y.roll(1, 0)), energy).sum() <= 3


def test_loss_names_its_terms_and_reaches_every_parameter_but_the_teacher(name: str) -> None:
    method = objective(name)
    reached = dict.fromkeys((key for key, p in method.named_parameters() if p.requires_grad), False)
    for seed in range(6):  # a method may fill its memory first
        terms = step(method, 8, seed=seed)
        assert "loss" in terms
        assert len(terms) > 1
        for term in terms.values():
            assert term.shape == ()
            assert torch.isfinite(term)
        assert [key for key, term in terms.items() if term.requires_grad] == ["loss"]
        terms["loss"].backward()
        for key, parameter in method.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, f"a gradient reached {key}, which is not trained"
                continue
            assert parameter.grad is not None, f"no gradient reached {key}; DistributedDataParallel would refuse it"
            assert torch.isfinite(parameter.grad).all(), key
            reached[key] |= bool(parameter.grad.any())
        method.after_step(0.5 + seed / 12)
    assert all(reached.values()), [key for key, value in reached.items() if not value]


def test_a_step_that_is_skipped_changes_nothing(name: str) -> None:
    """A loss whose gradient was not finite, say, is not followed by `after_step`."""
    method, other = objective(name), objective(name)
    step(method, 8, seed=1)
    for key, value in method.state_dict().items():
        if "running_" not in key and "num_batches_tracked" not in key:  # of batch norms, which see every loss
            assert torch.equal(value, other.state_dict()[key]), key
    method.load_state_dict(other.state_dict())
    for one in (method, other):
        step(one, 8, seed=2)
        one.after_step(0.1)
    for key, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_embedding_is_the_backbone_s(name: str) -> None:
    method = objective(name).eval()
    x, _ = views(4)
    assert torch.equal(method.embed(x), method.backbone(x))
    assert method.embed(x).shape == (4, 12)


def train(method: Objective, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for number in steps:
        loss = step(method, 8, seed=number)["loss"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(number / 12)
    return losses


def resume(rank: int, folder: str) -> None:
    """In a new process: a fresh objective takes the state of the old one and goes on."""
    torch.set_num_threads(1)
    for file in Path(folder).glob("*.state"):
        method = objective(file.stem, seed=99)
        state = torch.load(file, weights_only=True)
        method.load_state_dict(state["objective"])
        optimizer = adam(method)
        optimizer.load_state_dict(state["optimizer"])
        torch.save(train(method, optimizer, range(7, 12)), file.with_suffix(".losses"))


def adam(method: Objective) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-2)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    """For each objective the losses of five steps: of a run that was not interrupted, and of one in a new process."""
    folder, losses = tmp_path_factory.mktemp("states"), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for one in NAMES:
        method = objective(one)
        optimizer = adam(method)
        train(method, optimizer, range(7))
        state = {"objective": method.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
        torch.save(state, folder / f"{one}.state")
        losses[one] = train(method, optimizer, range(7, 12))
    torch.set_num_threads(threads)
    torch.multiprocessing.spawn(resume, (str(folder),), nprocs=1)
    return {one: (losses[one], torch.load(folder / f"{one}.losses")) for one in NAMES}


def test_state_dict_holds_all_that_affects_numbers(name: str, resumed: typing.Any) -> None:
    """Seven steps, saved; a fresh one in a new process goes on with the same losses, bit for bit."""
    uninterrupted, after_resume = resumed[name]
    assert len(set(uninterrupted)) == 5
    assert uninterrupted == after_resume


def test_bfloat16_autocast_gives_finite_float32_losses_and_gradients(name: str) -> None:
    method = objective(name).float()
    for seed in range(6):
        torch.manual_seed(seed)
        images = [view.float() for view in views(8, seed=seed, like=method)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method(images, samples(8, seed=seed))["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        method.after_step(0.5)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)


def test_objective_says_what_it_is(name: str) -> None:
    method = objective(name)
    assert method.against_collapse in typing.get_args(Mechanism)
    assert source_names_paper(name), f"the docstring of objectives/{name}.py must name the paper and the authors' code"
