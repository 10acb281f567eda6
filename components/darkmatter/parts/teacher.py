"""A teacher: a copy of a network that follows it as an exponential moving average and is never trained itself.

A. Tarvainen, H. Valpola, "Mean teachers are better role models" (2017), https://arxiv.org/abs/1703.01780.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def copy_of(student: Module) -> Module:
    """A teacher with the student's weights; no gradient ever reaches it."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, for parameters.

    Buffers stay the teacher's own: its batch norms see its own activations when it runs on training views.
    """
    targets: list[torch.Tensor] = list(teacher.parameters())
    sources: list[torch.Tensor] = list(student.parameters())
    torch._foreach_lerp_(targets, sources, 1 - momentum)


def cosine_momentum(base: float, progress: float) -> float:
    """From `base` to 1 along a cosine (BYOL, section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2
