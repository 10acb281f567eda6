"""Gather and mean over all ranks, with correct gradients. In one process each is the identity.

The contract that makes N ranks equal one: every rank's loss is a share of the global loss, mean over ranks; what it needs
of other ranks comes through `gather` or `mean`, whose backward passes sum what every rank asks of a value. Averaging the
parameter gradients over ranks, as DistributedDataParallel does, then gives the gradient of the global loss.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.overrides import TorchFunctionMode


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Shaped[Tensor, "batch *rest"]) -> Shaped[Tensor, "global_batch *rest"]:
    """Concatenates the ranks' equally large batches in rank order. The gradient of a row is summed over all ranks."""
    return _Gather.apply(x) if world_size() > 1 else x


def mean(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The mean over ranks, with gradient."""
    return _Sum.apply(x) / world_size() if world_size() > 1 else x


def draw(sample: Callable[[int], Tensor], batch: int) -> Tensor:
    """This rank's rows of `sample(size of the global batch)`, for random numbers that the number of ranks must not change.

    Every rank seeds its generator alike and draws for all; so all generators stay alike as well.
    """
    start = rank() * batch
    return sample(batch * world_size())[start : start + batch]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class global_batch_norm(TorchFunctionMode):  # noqa: N801 (used as a context manager, like torch.no_grad)
    """Within it every batch norm, whoever wrote the layer, normalises by the statistics of the global batch.

    torch.nn.SyncBatchNorm refuses CPU tensors and replaces layers by type, which misses timm's; this one meets the call
    that they all make. With one rank it changes nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and world_size() > 1:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        with torch._C.DisableTorchFunction():
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, centre, variance = _BatchNorm.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        count = input.numel() // input.shape[1] * world_size()
        running_mean.lerp_(centre.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    return y


class _BatchNorm(torch.autograd.Function):
    """With torch's kernels for the arithmetic, and one small message forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        # One of the kernels inside of batch_norm: mean and biased variance, in a twentieth of var_mean's time (measured).
        own = torch.stack(torch.batch_norm_update_stats(exact, None, None, 0.0))
        centres, variances = gather(own[None]).unbind(1)
        centre = centres.mean(0)
        variance = (variances + (centres - centre).square()).mean(0)
        ctx.save_for_backward(x, weight, centre, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(centre, variance)
        return _normalise(x, weight, bias, centre, variance, eps), centre, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, centre, variance = ctx.saved_tensors
        # As if the mean and the variance were constants.
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, centre, variance, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            # What comes through them is an affine map of the normalised x, so a batch norm itself.
            sums = torch.stack([of_weight, of_bias])
            dist.all_reduce(sums)
            slope = torch.rsqrt(variance + ctx.eps) * (1 if weight is None else weight)
            sums *= -slope / (x.numel() // x.shape[1] * world_size())
            of_x += _normalise(x, sums[0], sums[1], centre, variance, ctx.eps)
        return of_x, of_weight if ctx.needs_input_grad[1] else None, of_bias if ctx.needs_input_grad[2] else None, None


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: Tensor, variance: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(x, weight, bias, centre, variance, False, 0.0, eps, False)
