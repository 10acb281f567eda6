"""How much memory a worker will need, told before anything starts, and what would fit when it was too much."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from darkmatter.augmentations import View
from darkmatter.console import Stopped
from darkmatter.objectives import Objective, Samples, Views
from darkmatter.training import optimizers, parallel

_PROBES = (2, 4, 8)  # samples; a parabola, since what is kept of each pair of samples grows with the square


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one worker at the peak of a step, on its device."""

    weights: int
    """Parameters and buffers, a teacher's and a queue's included."""
    gradients: int
    optimizer: int
    views: int
    activations: int
    """What the backward pass needs of the forward pass."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(value)}" for name, value in dataclasses.asdict(self).items())
        return f"{_size(self.total)} ({parts})"


class DoesNotFit(Stopped):
    """A device has too little memory for its part of a batch."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a batch is divided."""

    batch: int
    workers: int
    parts: int
    """`pretrain.accumulate`."""

    @property
    def at_a_time(self) -> int:
        return self.batch // self.workers // self.parts


class Prediction:
    """Of one run: counted, not sampled. A few random images go through a copy of the objective on the CPU, and what autograd
    keeps of them is added up. What libraries take for themselves comes on top; a CUDA context is half a GiB."""

    def __init__(
        self,
        objective: Objective,
        plan: Sequence[View],
        *,
        optimizer: str,
        gpu: bool,
        activation_checkpointing: bool,
        holders: int,
    ) -> None:
        """
        Args:
            objective: stays as it is.
            plan: the views of an image.
            optimizer: as in `optimizers.build`.
            gpu: activations are of bf16.
            activation_checkpointing: as in `parallel.lay_out`.
            holders: workers that hold a part of the model each; 1 where each holds all of it.
        """
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self._weights = nbytes(objective.parameters()) // holders + nbytes(objective.buffers())
        self._gradients = nbytes(trained) // holders
        self._optimizer = optimizers.MOMENTS[optimizer] * self._gradients
        self._view = sum(4 * objective.backbone.channels * view.size**2 for view in plan)
        objective = copy.deepcopy(objective).train()
        parallel.change_blocks(objective, activation_checkpointing=activation_checkpointing)
        counts = []
        for batch in _PROBES:
            views = [torch.rand(batch, objective.backbone.channels, view.size, view.size) for view in plan]
            with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16, enabled=gpu):
                counts.append(kept(objective, views, torch.arange(batch)))
        self._activations = np.polynomial.Polynomial.fit(_PROBES, counts, deg=2)

    def need(self, samples: int) -> Need:
        """For so many at a time."""
        activations = max(0, round(float(self._activations(samples))))
        return Need(self._weights, self._gradients, self._optimizer, samples * self._view, activations)

    def advice(self, room: int, shares: Shares) -> str:
        """What to write into params.yaml so that it fits into so many bytes."""
        now = shares.at_a_time
        needed = f"{now} samples at a time need about {self.need(now)}, and there are {_size(room)}"
        # Allocators lose some of it to gaps.
        fits = next((n for n in range(now, 0, -1) if now % n == 0 and self.need(n).total <= 0.9 * room), 0)
        if not fits:
            return f"{needed}; not even one fits: set place.activation_checkpointing, or choose a smaller backbone"
        if fits == now:
            return f"{needed}: something else holds a part of them"
        return (
            f"{needed}; {fits} would fit: set pretrain.accumulate to {shares.parts * now // fits}, or pretrain.batch_size "
            f"to {fits * shares.workers * shares.parts}, or place.activation_checkpointing"
        )


@contextlib.contextmanager
def explained(prediction: Prediction, shares: Shares, device: torch.device) -> Iterator[None]:
    """
    Raises:
        DoesNotFit: memory ended within the block; says what would fit.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no type of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise DoesNotFit(f"out of memory: {prediction.advice(room(device), shares)}") from error


def room(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def kept(objective: nn.Module, views: Views, samples: Samples) -> int:
    """Bytes that the backward pass of a step needs of its forward pass, beside weights and views."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = objective(views, samples)  # what is kept lives as long as they do
    for tensor in (*objective.parameters(), *objective.buffers(), *views):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del terms
    return sum(sizes.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
