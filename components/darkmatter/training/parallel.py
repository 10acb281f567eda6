"""How an objective is laid over ranks and devices. What is chosen here changes time and memory, not what is learned."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from darkmatter import collectives
from darkmatter.augmentations import Prepared
from darkmatter.backbones import Backbone
from darkmatter.objectives import Objective, Samples, Terms, Views
from darkmatter.stream import Batch


def lay_out(
    objective: Objective,
    device: torch.device,
    *,
    compile: bool = False,
    activation_checkpointing: bool = False,
    fsdp: bool = False,
) -> Callable[[Views, Samples], Terms]:
    """Moves the objective to the device, and returns it, or what averages its gradients over the ranks when it is called.
    An optimizer is made after it.

    Args:
        objective: its parameters stay its own.
        device: of this rank.
        compile: each block of the backbones, by torch.compile. All blocks of a transformer share one program.
        activation_checkpointing: keep only what enters each block, and compute the rest again in the backward pass: a third
            more time for a fraction of the memory. T. Chen et al., "Training deep nets with sublinear memory cost" (2016),
            https://arxiv.org/abs/1604.06174.
        fsdp: each rank holds a part of every weight, gradient and moment, and a block's whole weights only while it is
            computed; nothing on one rank. Y. Zhao et al., "PyTorch FSDP" (2023), https://arxiv.org/abs/2304.11277.
    """
    divided = fsdp and collectives.world_size() > 1
    # FSDP takes no weights of another memory format.
    weights = torch.contiguous_format if divided else torch.channels_last
    objective = objective.to(device, memory_format=weights)  # type: ignore[call-overload]
    change_blocks(objective, compile=compile, activation_checkpointing=activation_checkpointing)
    if collectives.world_size() == 1:
        return objective
    if divided:
        mesh = init_device_mesh(device.type, (collectives.world_size(),))
        for block in blocks(objective):
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh, reshard_after_forward=False)
        for name in ("energy", "embed"):  # what is called beside forward
            register_fsdp_forward_method(objective, name)
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


def _forward_again(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _second_forward(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


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
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with alone:
            with autocast(device), global_batch_norm():
                terms = model([view.chunk(parts)[part] for view in views], samples.chunk(parts)[part])
            (terms["loss"] / parts).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / parts
    return sums


def whole(state: Any, *, keep: bool) -> Any:
    """A nested state in which what ranks hold in parts is put together, in main memory. All ranks call it; those that do not
    keep it get None in such places."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole(value, keep=keep) for name, value in state.items()}
    return [whole(value, keep=keep) for value in state] if isinstance(state, list | tuple) else state


def load_objective(objective: nn.Module, state: dict[str, Tensor]) -> None:
    """From a whole state; of what ranks hold in parts each takes its own."""
    own = objective.state_dict()
    objective.load_state_dict({name: _part(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Likewise."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: _part(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in state["state"][number].items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": moments})


def _part(value: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    # Every rank has read the whole: nothing has to be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
