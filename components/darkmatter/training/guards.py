"""What stops a step, or a run, that goes wrong: numbers not finite, gradients that leap, an energy that collapses."""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from darkmatter import collectives, health
from darkmatter.console import Stopped
from darkmatter.objectives import Objective

WINDOW = 128  # gradient norms that a new one is compared with
SIGMAS = 6.0
IN_A_ROW = 3

_PATIENCE = 3  # looks in a row with too small a margin, before a run is stopped
_RISE = 0.002  # above the best so far: slow starters (BYOL, I-JEPA, DINO) pass any floor late, but they keep rising


class Numbers:
    """Decides whether a step may be taken, alike on all ranks, and undoes what its forward pass left behind if not.

    A step is skipped when its loss or gradient is not finite, or when the gradient's norm is over the mean of the last
    `WINDOW` by `SIGMAS` of their standard deviations. A norm that is finite enters the window even so: a change that stays
    is let through after a few steps. Skipping costs the batch; the schedules go on.
    """

    def __init__(self, objective: Objective) -> None:
        self._norms = torch.zeros(WINDOW, dtype=torch.float64)
        self._seen = 0
        self._in_a_row = 0
        self.not_finite = 0
        """Steps skipped so far, since a number was not finite."""
        self.spikes = 0
        """Steps skipped so far, since the gradient leapt."""
        # The one thing that the forward pass of a step changes: running statistics. All else waits for `after_step`.
        norms = [module for module in objective.modules() if isinstance(module, _NormBase)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def before_step(self) -> None:
        """Remembers what a forward pass changes."""
        _copy(self._before, self._buffers)

    def may_step(self, loss: float, norm: float, step: int) -> bool:
        """
        Args:
            loss: the mean over ranks.
            norm: of the gradient that all ranks share.
            step: for messages.

        Raises:
            NotFinite: the last `IN_A_ROW` steps had numbers that are not finite.
        """
        reason = ""
        if not (abs(loss) < float("inf") and norm < float("inf")):  # False for NaN as well
            self.not_finite += 1
            self._in_a_row += 1
            reason = f"the loss is {loss:g}, the norm of the gradient {norm:g}"
        else:
            self._in_a_row = 0
            if self._seen >= WINDOW:
                mean, deviation = float(self._norms.mean()), float(self._norms.std())
                if norm > mean + SIGMAS * deviation:
                    self.spikes += 1
                    reason = f"the norm of the gradient is {norm:g}, over {mean:g} by {SIGMAS:g} x {deviation:g}"
            self._norms[self._seen % WINDOW] = norm
            self._seen += 1
        if reason:
            _copy(self._buffers, self._before)
            if collectives.rank() == 0:
                print(f"darkmatter: step {step} is skipped: {reason}", file=sys.stderr, flush=True)
        if self._in_a_row >= IN_A_ROW:
            raise NotFinite(
                f"step {step} is the last of {IN_A_ROW} in a row skipped: {reason}; lower the learning rate"
            )
        return not reason

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": self._norms,
            "seen": self._seen,
            "in_a_row": self._in_a_row,
            "not_finite": self.not_finite,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms.copy_(state["norms"])
        self._seen, self._in_a_row = state["seen"], state["in_a_row"]
        self.not_finite, self.spikes = state["not_finite"], state["spikes"]


class NotFinite(Stopped):
    """Training ended itself: its numbers have left the range of floating point, and the weights are as they were before."""


class Collapse:
    """Decides whether the energy has stopped to tell compatible pairs from others: for `_PATIENCE` looks in a row the margin
    lies below a floor and does not rise."""

    def __init__(self, floor: float) -> None:
        """
        Args:
            floor: of the energy margin.
        """
        self._floor = floor
        self._low_looks = 0
        self._best = 0.0

    def look(self, margin: float, step: int, objective: Objective) -> None:
        """
        Raises:
            Collapsed: with the reason.
        """
        low = margin < min(self._floor, self._best + _RISE)
        self._low_looks = self._low_looks + 1 if low else 0
        self._best = max(self._best, margin)
        if low and collectives.rank() == 0:
            print(f"darkmatter: energy margin {margin:.3f} at step {step}: collapsing?", file=sys.stderr, flush=True)
        if self._low_looks >= _PATIENCE:
            raise health.Collapsed(
                f"collapse at step {step}: for {_PATIENCE} looks in a row the energy told two views of one held-out sample "
                f"from views of two with an AUROC below {self._floor} (pretrain.min_energy_margin) that does not rise, now "
                f"{margin:.3f}; 0.5 is chance. What should prevent it in {type(objective).__name__}: "
                f"{objective.against_collapse}; look at the options of the objective, at the learning rate and at the "
                "picture of the views"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"low_looks": self._low_looks, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._low_looks, self._best = state["low_looks"], state["best"]


def require_finite(state: Any, step: int, name: str = "") -> None:
    """Raises NotFinite with the name of the first tensor of a nested state that is not."""
    if isinstance(state, Tensor):
        # aminmax passes NaN on, reads once and makes no tensor: a twentieth of the time of isfinite (measured).
        if state.is_floating_point() and state.numel() and not all(map(math.isfinite, state.aminmax())):
            raise NotFinite(f"{name} is not finite at step {step}, and is not saved; lower the learning rate")
    elif isinstance(state, dict):
        for key, value in state.items():
            require_finite(value, step, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for place, value in enumerate(state):
            require_finite(value, step, f"{name}.{place}")


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, values)


def gradient_norm(module: nn.Module) -> Tensor:
    """Of all parameters together, 2-norm; not finite if any element is not."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip(module: nn.Module, norm: Tensor, limit: float) -> None:
    """Shrinks all gradients alike so that their norm is `limit` at most; 0 for no limit. `norm` must be finite: else one
    infinite element would make 0 of all others and NaN of itself."""
    if limit:
        nn.utils.clip_grads_with_norm_(module.parameters(), limit, norm)
