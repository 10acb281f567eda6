"""One rank and W ranks give the same loss, gradient and buffers for the same global batch: real processes over gloo."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from toys import NAMES, Toy, objective, views

from conftest import free_port
from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.training import loop

GLOBAL_BATCH = 12
STEPS = 3


def train(name: str) -> dict[str, torch.Tensor]:
    """A few steps; the gradients of the last, and everything in the state."""
    method = objective(name)
    share = GLOBAL_BATCH // collectives.world_size()
    mine = slice(collectives.rank() * share, (collectives.rank() + 1) * share)
    model = loop.distributed(method, torch.device("cpu"))
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        with collectives.global_batch_norm():
            terms = model(tuple(view[mine] for view in views(GLOBAL_BATCH, seed=step)))
        terms["loss"].backward()
        losses.append(collectives.mean(terms["loss"].detach()))
        if step < STEPS - 1:
            optimizer.step()
            method.after_step(step / STEPS)
    gradients = {f"gradient of {key}": p.grad for key, p in method.named_parameters()}
    return {"losses": torch.stack(losses), **gradients, **method.state_dict()}


def rank_main(rank: int, world_size: int, port: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.save(train(name), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process(name: str, world_size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_main, (world_size, free_port(), name, str(tmp_path)), nprocs=world_size)
    alone = train(name)
    for rank in range(world_size):
        together = torch.load(tmp_path / f"{rank}.pt")
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(
                together[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}"
            )


def test_collectives_are_the_identity_in_one_process() -> None:
    x = torch.rand(3, 2, requires_grad=True)
    assert collectives.gather(x) is x
    assert collectives.mean(x) is x
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    network = Backbone(Toy(), mean=[0.0], std=[1.0])
    images = torch.rand(4, 1, 8, 8)
    expected = network(images)
    with collectives.global_batch_norm():
        torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
