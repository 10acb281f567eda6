"""One rank and W ranks give the same loss, gradient and state for the same global batch: real processes over gloo.

So do options that save memory: a batch in parts, the inside of blocks computed again in the backward pass, the weights
divided among the ranks.
"""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from toys import NAMES, Toy, objective, samples, views

from conftest import free_port
from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.training import parallel

GLOBAL_BATCH = 12
STEPS = 5
#: Ranks, parts of a batch, and options of `parallel.lay_out`.
LAYOUTS: dict[str, tuple[int, int, dict[str, bool]]] = {
    "3": (3, 1, {}),
    "2 in parts, again": (2, 2, {"activation_checkpointing": True}),
    "2 with divided weights, in parts": (2, 2, {"fsdp": True}),
}


def train(name: str, parts: int, **layout: bool) -> dict[str, torch.Tensor]:
    """A few steps; the gradients of the last, and everything in the state."""
    method, device = objective(name), torch.device("cpu")
    mine = torch.arange(GLOBAL_BATCH).reshape(parts, collectives.world_size(), -1)[:, collectives.rank()].ravel()
    model = parallel.lay_out(method, device, **layout)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(step)
        mine_views = tuple(view[mine] for view in views(GLOBAL_BATCH, seed=step, like=method))
        terms = parallel.backward(model, mine_views, samples(GLOBAL_BATCH, seed=step)[mine], device, parts=parts)
        losses.append(collectives.mean(torch.stack(list(terms.values()))))
        if step < STEPS - 1:
            optimizer.step()
            method.after_step(step / STEPS)
    gradients = {f"gradient of {key}": p.grad for key, p in method.named_parameters() if p.requires_grad}
    state = {"losses and terms": torch.stack(losses), **gradients, **method.state_dict()}
    return parallel.whole(state, keep=True)


def rank_main(rank: int, world_size: int, port: int, folder: str, parts: int, layout: dict[str, bool]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    results: dict[str, Any] = {}
    for name in NAMES:
        try:
            results[name] = train(name, parts, **layout)
        except Exception:  # noqa: BLE001 (shown by the test of this objective)
            results[name] = traceback.format_exc()
            break  # the ranks are no longer in step
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    """The parts of a batch, and what every rank of a group computed, by objective."""
    ranks, parts, layout = request.param
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (ranks, free_port(), str(folder), parts, layout), nprocs=ranks)
    return parts, [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process(name: str, together: tuple[int, list[dict[str, Any]]]) -> None:
    parts, everything = together
    alone = train(name, parts)
    for results in everything:
        result = results.get(name, "an objective before it failed")
        assert not isinstance(result, str), result
        assert result.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(result[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}")


def test_collectives_are_the_identity_in_one_process() -> None:
    x = torch.rand(3, 2, requires_grad=True)
    assert collectives.gather(x) is x
    assert collectives.mean(x) is x
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    torch.manual_seed(0)
    expected = torch.rand(3, 2)
    torch.manual_seed(0)
    assert torch.equal(collectives.draw(lambda size: torch.rand(size, 2), 3), expected)
    network = Backbone(Toy(), mean=[0.0], std=[1.0], image_size=8)
    images = torch.rand(4, 1, 8, 8)
    expected = network(images)
    with collectives.global_batch_norm():
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
