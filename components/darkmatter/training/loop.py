"""The training loop. There is one."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darkmatter import collectives, health
from darkmatter.augmentations import Prepared, Views
from darkmatter.objectives import Objective
from darkmatter.stream import Stream
from darkmatter.training import PretrainConfig, guards, optimizers, parallel, rates
from darkmatter.training.checkpoint import Checkpoints, Saver
from darkmatter.training.goodput import Clock
from darkmatter.training.history import History, Row


@dataclasses.dataclass
class TrainState:
    """All that a resume needs. The position in the data and every random number follow from the step."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    numbers: guards.Numbers
    collapse: guards.Collapse
    step: int = 0

    @classmethod
    def fresh(cls, objective: Objective, config: PretrainConfig) -> "TrainState":
        """Before the first step."""
        optimizer = optimizers.build(objective, config.optimizer, layer_decay=config.layer_decay)
        return cls(objective, optimizer, guards.Numbers(objective), guards.Collapse(config.min_energy_margin))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **{name: part.state_dict() for name, part in self._parts().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        parallel.load_objective(self.objective, state["objective"])
        parallel.load_optimizer(self.optimizer, state["optimizer"])
        self.numbers.load_state_dict(state["numbers"])
        self.collapse.load_state_dict(state["collapse"])

    def _parts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "step"}


def fit(
    objective: Objective,
    stream: Stream[Prepared],
    views: Views,
    held_out: Sequence[bytes],
    config: PretrainConfig,
    *,
    checkpoints: Checkpoints,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    show: Callable[[Row], None] = lambda row: None,
    session: float = 0.0,
    **layout: bool,
) -> TrainState:
    """Trains to the end, from the newest checkpoint if there is one. Every rank calls it.

    Args:
        objective: fresh; its weights are overwritten when there is a checkpoint.
        stream: this rank's share of every batch, prepared by `views`.
        views: the policy.
        held_out: images for the health, not trained on.
        config: rates and intervals.
        checkpoints: of the run; its history lies at the same address.
        device: to train on.
        alive: called after every step.
        asked_to_stop: whether to save and return before the end; one rank that is asked is enough.
        show: called on rank 0 with each row of the history.
        session: when the work on the run was taken up, seconds since 1970, for the history.
        layout: options of `parallel.lay_out`.

    Raises:
        NotFinite: numbers left the range of floating point, and skipping steps was of no help.
        Collapsed: the energy margin stayed below `config.min_energy_margin`.
    """
    total = config.epochs * stream.steps_per_epoch
    warmup = config.warmup_epochs * stream.steps_per_epoch
    model = parallel.lay_out(objective, device, **layout)
    state = TrainState.fresh(objective, config)
    if (saved := checkpoints.load_newest()) is not None:
        state.load_state_dict(saved)
    drawn = views(held_out, np.arange(len(held_out)), seed=config.seed, epoch=-1)
    first, second = (view.to(device) for view in drawn[:2])
    recorder = _Recorder(checkpoints.address, state, config, session, show) if collectives.rank() == 0 else None
    margin, clock = None, Clock()

    # Rows that wait must be written also where the loop ends with a reason: they led there.
    with Saver(checkpoints) as saver, contextlib.closing(recorder) if recorder else contextlib.nullcontext():
        for batch in parallel.fed(stream.batches(state.step, total), device):
            clock.spent("data")
            optimizers.set_rates(
                state.optimizer,
                rates.learning_rate(state.step, peak=config.learning_rate, warmup=warmup, total=total),
                rates.cosine(state.step, config.weight_decay, config.weight_decay_end, total=total),
            )
            torch.manual_seed(config.seed + state.step)  # what an objective draws is a function of the step as well
            images = views.finish(batch.loaded, seed=config.seed, epoch=batch.epoch, whole=objective.num_views)
            state.numbers.before_step()
            terms = parallel.backward(model, images, batch.loaded.samples, device, parts=config.accumulate)
            norm = guards.gradient_norm(objective)
            # One small message between the ranks, one wait for the device: all decide alike.
            asked = norm.new_tensor(float(asked_to_stop()))
            told = collectives.mean(torch.stack([terms["loss"].to(norm), norm, asked])).tolist()
            if state.numbers.may_step(told[0], told[1], state.step):
                guards.clip(objective, norm, config.clip_norm)
                state.optimizer.step()
                objective.after_step(state.step / total)
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            clock.spent("step")

            ending = state.step == total or told[2] > 0
            saving = ending or state.step % config.save_every == 0
            looking = state.step == total or state.step % config.health_every == 0
            row: Row = {}
            if saving or state.step % config.log_every == 0:
                row |= {name: float(collectives.mean(value)) for name, value in terms.items()}
                row |= {"gradient_norm": told[1], "epoch": batch.epoch}
                clock.spent("step")
            if looking:
                row |= look(objective, first, second, device)
                clock.spent("evaluation")
                margin = row["energy_margin"]
            if recorder and row:
                recorder.write(row, clock)
            if looking and state.step > total / 3:  # before, a margin may be anything
                state.collapse.look(row["energy_margin"], state.step, objective)
            if saving:
                whole = parallel.whole(state.state_dict(), keep=recorder is not None)
                if recorder:
                    saver.save(state.step, whole, margin)
                clock.spent("save")
            alive()
            if ending:
                break
    return state


def look(objective: Objective, first: Tensor, second: Tensor, device: torch.device) -> Row:
    """The health of the moment, on held-out views: energy margin, RankMe, and how far embeddings of unit length spread."""
    with parallel.autocast(device):
        compatible, incompatible = health.pair_energies(objective, first, second)
        embeddings = health.embeddings(objective, first)
    return {
        "energy_margin": health.auroc(compatible.float(), incompatible.float()),
        "rankme": health.rankme(embeddings),
        "spread": health.spread(embeddings),
    }


class _Recorder:
    """Adds to each row of the history what all have: rates, times, and what was skipped."""

    def __init__(
        self, address: str, state: TrainState, config: PretrainConfig, session: float, show: Callable[[Row], None]
    ) -> None:
        self._history, self._show = History(address), show
        self._state, self._config, self._session = state, config, session
        self._step = state.step

    def write(self, row: Row, clock: Clock) -> None:
        state, times = self._state, clock.read()
        images = (state.step - self._step) * self._config.batch_size
        self._step = state.step
        whole = {
            "step": state.step,
            **row,
            "learning_rate": max(group["lr"] for group in state.optimizer.param_groups),
            "skipped_not_finite": state.numbers.not_finite,
            "skipped_spikes": state.numbers.spikes,
            "images_per_second": round(images / max(sum(times.values()), 1e-9), 1),
            "workers": collectives.world_size(),
            **times,
            "time": time.time(),
            "session": self._session,
        }
        # A step that was skipped may have a loss that is no number; no file for people or MLflow has a place for it.
        finite = {name: value for name, value in whole.items() if math.isfinite(value)}
        self._history.append(finite)
        self._show(finite)

    def close(self) -> None:
        self._history.flush()
