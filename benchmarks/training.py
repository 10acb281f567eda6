"""What training spends on other things than arithmetic.

    python benchmarks/training.py      # writes into docs/performance.md

A save: the loop waits for a copy of the state, the file is written beside it. Both are timed, and how much slower steps are
while it is written.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from darkmatter.training.checkpoint import Checkpoints, Saver
from darkmatter.training.optimizers import adamw
from data import PAGE, replace_section


def trained(millions: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network of so many parameters and AdamW's two moments of each."""
    network = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(millions)))
    optimizer = adamw(network, weight_decay=0.05)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return network, optimizer


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def saving_section(rounds: int) -> list[str]:
    lines = [
        "| parameters | state | saved at once, s | the loop waits, s | share | of all rounds | speed meanwhile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    images = torch.randn(256, 1000)
    work = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000))

    def step() -> None:
        work(images).square().mean().backward()
        work.zero_grad(set_to_none=True)

    for millions in (5, 25, 86):
        network, optimizer = trained(millions)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        whole, waited, slowed = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(folder, keep=1)
            with Saver(checkpoints) as saver:
                saver.save(0, state)  # the copy is made once
                saver.save(0, state)
                saver._settle(last=True)
                for number in range(1, rounds + 1):
                    whole.append(seconds(lambda: checkpoints.save(2 * number, state)))  # noqa: B023
                    quiet = statistics.median(seconds(step) for _ in range(30))
                    waited.append(seconds(lambda: saver.save(2 * number + 1, state)))  # noqa: B023
                    steps = []
                    while saver._pending and not saver._pending.done():
                        steps.append(seconds(step))
                    saver._settle(last=True)
                    slowed.append(quiet / statistics.median(steps) if steps else 1.0)
        shares = [one / other for one, other in zip(waited, whole, strict=True)]
        size = sum(one.numel() for one in network.parameters()) * 12 / 2**20
        lines.append(
            f"| {millions} M | {size:,.0f} MiB | {statistics.median(whole):.2f} | {statistics.median(waited):.3f} | "
            f"{statistics.median(shares):.1%} | {min(shares):.1%} to {max(shares):.1%} | {statistics.median(slowed):.0%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = (
        f"`benchmarks/training.py`, {datetime.date.today()}, torch {torch.__version__}, one thread, {arguments.rounds} "
        "rounds; weights and AdamW's moments, float32, to a disk with fsync and sha256. The last column is the speed of a "
        "small training step while a save is written, against its speed when none is, on the same two cores."
    )
    replace_section(PAGE, "## What a checkpoint costs the loop", [about, "", *saving_section(arguments.rounds)])


if __name__ == "__main__":
    main()
