"""Heads that several objectives put on a backbone."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Term = TypeVar("Term", bound=Callable[..., Tensor])


def projector(widths: Sequence[int], *, last_norm: bool = False, last_bias: bool = False) -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1], batch norm and ReLU between them. Predictors are built of it as well.

    Args:
        widths: input, hidden and output features.
        last_norm: a batch norm without scale and shift after the last layer.
        last_bias: a bias in the last layer; the others have one in their batch norm.
    """
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        if index:
            layers += [nn.BatchNorm1d(before), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(before, after, bias=last_bias and index == len(widths) - 2))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """Scores of unit vectors against `count` unit vectors that are learned: cosines, (B, D) -> (B, count).

    The weights are normalised where they are used (weight normalisation with a gain of 1), so that no step of an
    optimizer can leave the sphere.
    """

    def __init__(self, features: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, features))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "*batch features"], *, trained: Bool[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch count"]:
        """`trained` false: the gradient of the prototypes is zero. Not none, which DistributedDataParallel waits for."""
        weight: Tensor = self.weight
        if trained is not None:
            fixed = weight.detach()
            weight = fixed + (weight - fixed) * trained
        return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1))


class PrototypeHead(nn.Module):
    """The head of DINO: linear layers with GELU and without batch norm, a bottleneck, and prototypes on its unit sphere.

    M. Caron et al., "Emerging properties in self-supervised vision transformers" (2021), appendix C.
    """

    def __init__(self, features: int, hidden: Sequence[int], prototypes: int) -> None:
        """`hidden` ends with the bottleneck, whose unit sphere the prototypes live on."""
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise([features, *hidden])):
            if index:
                layers.append(nn.GELU())
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
        self.layers = nn.Sequential(*layers)
        self.prototypes = Prototypes(hidden[-1], prototypes)

    def forward(
        self, x: Float[Tensor, "*batch features"], *, trained: Bool[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch prototypes"]:
        """`trained` as for Prototypes."""
        return self.prototypes(self.layers(x), trained=trained)


def same_prototype(
    x: Float[Tensor, "batch prototypes"], y: Float[Tensor, "batch prototypes"], temperature: float
) -> Float[Tensor, " batch"]:
    """What it costs, in nats, that both views have the same prototype: min over k of -log p_k(x) - log p_k(y)."""
    return (-F.log_softmax(x / temperature, dim=1) - F.log_softmax(y / temperature, dim=1)).amin(1)


def exact(term: Term) -> Term:
    """For a term of a loss: within it autocast is off, which would round the products of float32 arguments to bf16."""

    @functools.wraps(term)
    def call(*args: Any, **options: Any) -> Any:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return term(*args, **options)

    return cast(Term, call)


def full_precision(x: Tensor) -> Tensor:
    """bf16 and fp16, as autocast makes them, to float32; float32 and float64 stay. Losses are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
