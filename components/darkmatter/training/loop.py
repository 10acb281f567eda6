"""The training loop. There is one."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from darkmatter import collectives, health
from darkmatter.augmentations import Prepared, Views
from darkmatter.objectives import Objective
from darkmatter.stream import Stream
from darkmatter.training import PretrainConfig, checkpoint
from darkmatter.training.optimizers import adamw, set_learning_rate
from darkmatter.training.rates import learning_rate

_PATIENCE = 3  # looks in a row with too small a margin, before a run is stopped
_RISE = 0.002  # above the best so far: slow starters (BYOL, I-JEPA, DINO) pass any floor late, but they keep rising


@dataclasses.dataclass
class TrainState:
    """All that a resume needs. The position in the data and every random number follow from the step."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    step: int = 0
    low_looks: int = 0
    """How many looks in a row have found an energy margin that is too small and no higher than before."""
    best_margin: float = 0.0
    """The largest of the looks that count."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "low_looks": self.low_looks,
            "best_margin": self.best_margin,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.low_looks, self.best_margin = state["step"], state["low_looks"], state["best_margin"]
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])


def fit(
    objective: Objective,
    stream: Stream[Prepared],
    views: Views,
    held_out: Sequence[bytes],
    config: PretrainConfig,
    *,
    folder: Path,
    device: torch.device,
) -> TrainState:
    """Trains to the end, from the newest checkpoint in `folder` if there is one. Every rank calls it.

    Args:
        objective: fresh; its weights are overwritten when there is a checkpoint.
        stream: this rank's share of every batch, prepared by `views`.
        views: the policy.
        held_out: images for the health, not trained on.
        config: rates and intervals.
        folder: of checkpoints and history, the same for all ranks.
        device: to train on.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is from before.
        Collapsed: the energy margin stayed below `config.min_energy_margin`.
    """
    total = config.epochs * stream.steps_per_epoch
    warmup = config.warmup_epochs * stream.steps_per_epoch
    objective = objective.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(objective, adamw(objective, weight_decay=config.weight_decay))
    if (saved := checkpoint.load_newest(folder)) is not None:
        state.load_state_dict(saved)
    model = distributed(objective, device)
    drawn = views(held_out, np.arange(len(held_out)), seed=config.seed, epoch=-1)
    first, second = (view.to(device) for view in drawn[:2])
    history = checkpoint.History(folder, step=state.step) if collectives.rank() == 0 else None
    meter = _Meter(config.batch_size, state.step)

    for batch in stream.batches(state.step, total):
        set_learning_rate(
            state.optimizer, learning_rate(state.step, peak=config.learning_rate, warmup=warmup, total=total)
        )
        torch.manual_seed(config.seed + state.step)  # what an objective draws is a function of the step as well
        loaded = batch.loaded.to(device)
        images = views.finish(loaded, seed=config.seed, epoch=batch.epoch, whole=objective.num_views)
        with autocast(device), collectives.global_batch_norm():
            terms = model(images, loaded.samples)
        terms["loss"].backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        objective.after_step(state.step / total)
        state.step += 1

        row: dict[str, float] = {}
        saving = state.step % config.save_every == 0 or state.step == total
        if saving or state.step % config.log_every == 0:
            row |= {name: float(collectives.mean(value.detach())) for name, value in terms.items()}
            if not all(map(math.isfinite, row.values())):  # before it is saved
                raise FloatingPointError(f"the loss is not finite at step {state.step}: {row}; lower the learning rate")
        if state.step % config.health_every == 0 or state.step == total:
            row |= look(objective, first, second, device)
            if state.step > total / 3:  # before, a margin may be anything
                margin = row["energy_margin"]
                low = margin < min(config.min_energy_margin, state.best_margin + _RISE)
                state.low_looks = state.low_looks + 1 if low else 0
                state.best_margin = max(state.best_margin, margin)
                if low and history:
                    print(f"energy margin {margin:.3f} at step {state.step}: collapsing?", file=sys.stderr)
        if row and history:
            row |= {"learning_rate": state.optimizer.param_groups[0]["lr"], "epoch": batch.epoch}
            history.append({"step": state.step, **row, **meter.read(state.step)})
        if history and saving:
            checkpoint.save(folder, state.step, state.state_dict())
        if state.low_looks >= _PATIENCE:
            raise health.Collapsed(_reason(objective, state.step, row["energy_margin"], config))
    return state


def _reason(objective: Objective, step: int, margin: float, config: PretrainConfig) -> str:
    return (
        f"collapse at step {step}: for {_PATIENCE} looks in a row the energy told two views of one held-out sample from "
        f"views of two with an AUROC below {config.min_energy_margin} (pretrain.min_energy_margin) that does not rise, now "
        f"{margin:.3f}; 0.5 is chance. What should prevent it in {type(objective).__name__}: {objective.against_collapse}; "
        "look at the options of the objective, at the learning rate and at the picture of the views"
    )


def distributed(objective: Objective, device: torch.device) -> Callable[..., Any]:
    """The objective as it is, or wrapped so that gradients are averaged over the ranks."""
    if collectives.world_size() == 1:
        return objective
    # Buffers are not broadcast: they are equal on all ranks already, since batch norms use global statistics.
    devices = [device.index or 0] if device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the device computes in it; CPUs mostly emulate it, slower than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def look(objective: Objective, first: torch.Tensor, second: torch.Tensor, device: torch.device) -> dict[str, float]:
    """The health of the moment: energy margin and RankMe on held-out views."""
    with autocast(device):
        compatible, incompatible = health.pair_energies(objective, first, second)
        embeddings = health.embeddings(objective, first)
    return {
        "energy_margin": health.auroc(compatible.float(), incompatible.float()),
        "rankme": health.rankme(embeddings),
    }


class _Meter:
    """Images per second since the last reading, health and checkpoints included."""

    def __init__(self, batch_size: int, step: int) -> None:
        self._batch_size, self._step, self._time = batch_size, step, time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        rate = (step - self._step) * self._batch_size / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return {"images_per_second": round(rate, 1)}
