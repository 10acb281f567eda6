"""Heads that several objectives put on a backbone."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def projector(widths: Sequence[int], *, last_norm: bool = False) -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1], batch norm and ReLU between them; the last one has no bias.

    Args:
        widths: input, hidden and output features.
        last_norm: a batch norm without scale and shift after the last layer.
    """
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        if index:
            layers += [nn.BatchNorm1d(before), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(before, after, bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


def full_precision(x: Tensor) -> Tensor:
    """bf16 and fp16, as autocast makes them, to float32; float32 and float64 stay. Losses are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
