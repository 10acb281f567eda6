"""How an objective is laid over ranks and devices. What is chosen here changes time and memory, not what is learned."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from darkmatter import collectives
from darkmatter.augmentations import Prepared
from darkmatter.backbones import Backbone
from darkmatter.objectives import Objective, Samples, Terms, Views
from darkmatter.stream import Batch


def lay_out(
    objective: Objective, device: torch.device, *, compile: bool = False, activation_checkpointing: bool = False
) -> Callable[[Views, Samples], Terms]:
    """Moves the objective to the device, and returns it, or what averages its gradients over the ranks when it is called.

    Args:
        objective: its parameters stay its own.
        device: of this rank.
        compile: each block of the backbones, by torch.compile. All blocks of a transformer share one program.
        activation_checkpointing: keep only what enters each block, and compute the rest again in the backward pass: a third
            more time for a fraction of the memory. T. Chen et al., "Training deep nets with sublinear memory cost" (2016),
            https://arxiv.org/abs/1604.06174.
    """
    objective = objective.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    change_blocks(objective, compile=compile, activation_checkpointing=activation_checkpointing)
    if collectives.world_size() == 1:
        return objective
    # Buffers are not broadcast: they are equal on all ranks already, since batch norms use global statistics. The name of
    # the option is a new one in torch 2.14, which warns of the old one, the only one that 2.11 has.
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(
        objective,
        device_ids=[device.index or 0] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{option: False},  # type: ignore[arg-type]
    )


def change_blocks(objective: Objective, *, compile: bool = False, activation_checkpointing: bool = False) -> None:
    """How the blocks of its backbones are run; as in `lay_out`."""
    if compile:
        # Blocks that differ in width are programs of their own, and again for evaluation: 8, the default, is too few for a
        # ResNet (measured), and beyond it torch would quietly go on without.
        torch._dynamo.config.recompile_limit = 64
    for block in blocks(objective):
        if compile:
            block.forward = torch.compile(block.forward)
        if activation_checkpointing:
            block.forward = functools.partial(_forward_again, block, block.forward)


def blocks(objective: nn.Module) -> list[nn.Module]:
    """Of all backbones: what follows one another in them (the blocks of a transformer or of a stage), if it is trained."""
    networks = [module.network for module in objective.modules() if isinstance(module, Backbone)]
    rows = [child for one in networks for child in one.children() if isinstance(child, nn.Sequential | nn.ModuleList)]
    return [block for row in rows for block in row if any(one.requires_grad for one in block.parameters())]


def _forward_again(block: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _second_forward(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _second_forward(block: nn.Module) -> Iterator[None]:
    """In the backward pass: batch norms use global statistics as they did before, and do not count the batch twice."""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        with global_batch_norm():
            yield
    finally:
        for buffer, value in zip(block.buffers(), before, strict=True):
            buffer.data.copy_(value)  # a version that autograd does not see: it saved the buffer, and never reads it


def global_batch_norm() -> contextlib.AbstractContextManager[Any]:
    """The mode, if there is more than one rank: torch.compile has less to do without."""
    return collectives.global_batch_norm() if collectives.world_size() > 1 else contextlib.nullcontext()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the device computes in it; CPUs mostly emulate it, slower than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def backward(
    model: Callable[[Views, Samples], Terms], views: Views, samples: Samples, device: torch.device, *, parts: int
) -> dict[str, Tensor]:
    """The gradient of the mean loss over so many equal parts of the batch, one after the other; the terms' means as well.

    Ranks exchange gradients once, in the last part.
    """
    sums: dict[str, Tensor] = {}
    for part in range(parts):
        last = part == parts - 1
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with alone:
            with autocast(device), global_batch_norm():
                terms = model([view.chunk(parts)[part] for view in views], samples.chunk(parts)[part])
            (terms["loss"] / parts).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / parts
    return sums


def fed(batches: Iterator[Batch[Prepared]], device: torch.device) -> Iterator[Batch[Prepared]]:
    """The batches on the device. To a GPU the next one is copied while this one is computed with, in a stream of its own."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)

    def fetch() -> Batch[Prepared] | None:
        batch = next(batches, None)
        with torch.cuda.stream(copies):
            return batch and dataclasses.replace(batch, loaded=batch.loaded.to(device))

    coming = fetch()
    while coming is not None:
        batch, computing = coming, torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        for tensor in batch.loaded.tensors():
            tensor.record_stream(computing)  # else the next copy could take its memory while it is still read
        coming = fetch()
        yield batch
