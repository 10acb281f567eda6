"""A teacher's distribution over prototypes as the target of a student's: self-distillation without labels.

M. Caron et al., "Emerging properties in self-supervised vision transformers" (2021), https://arxiv.org/abs/2104.14294.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.parts import heads, teacher


class Head(nn.Module):
    """A student's head over prototypes, the teacher's copy of it, and the centre of what the teacher says."""

    def __init__(self, features: int, hidden: Sequence[int], prototypes: int) -> None:
        """`hidden` ends with the bottleneck."""
        super().__init__()
        self.student = heads.PrototypeHead(features, hidden, prototypes)
        self.teacher = teacher.copy_of(self.student)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(prototypes))
        self._newest: Tensor | None = None

    def scores(
        self, x: Float[Tensor, "*batch features"], *, trained: Bool[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch prototypes"]:
        """The student's. `trained` false: the prototypes are frozen."""
        return heads.full_precision(self.student(x, trained=trained))

    @torch.no_grad()
    def targets(
        self, x: Float[Tensor, "*batch features"], temperature: Float[Tensor, ""]
    ) -> Float[Tensor, "*batch prototypes"]:
        """The teacher's distributions, centred and sharpened. In training `follow` will move the centre towards them."""
        scores = heads.full_precision(self.teacher(x))
        if self.training:
            self._newest = scores.flatten(0, -2).mean(0)
        return ((scores - self.centre) / temperature).softmax(-1)

    @torch.no_grad()
    def follow(self, momentum: float, centre_momentum: float) -> None:
        """After a step: the teacher's weights and the centre, a running mean over global batches (equation 4)."""
        teacher.follow(self.teacher, self.student, momentum)
        if self._newest is not None:
            self.centre.lerp_(collectives.mean(self._newest).to(self.centre.dtype), 1 - centre_momentum)
        self._newest = None


def cross_entropy(
    targets: Float[Tensor, "*batch prototypes"], scores: Float[Tensor, "*batch prototypes"], temperature: float
) -> Float[Tensor, "*batch"]:
    """Equation 2: H(P_t, P_s)."""
    return -(targets * F.log_softmax(scores / temperature, dim=-1)).sum(-1)


def across_views(
    targets: Float[Tensor, "whole_views_times_batch prototypes"],
    scores: Float[Tensor, "views_times_batch prototypes"],
    views: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Equation 3: mean of H over whole views for the teacher and all other views for the student."""
    students = scores.chunk(views)
    pairs = [
        cross_entropy(target, student, temperature).mean()
        for number, target in enumerate(targets.split(len(students[0])))
        for other, student in enumerate(students)
        if other != number
    ]
    return torch.stack(pairs).mean()


def entropies(targets: Float[Tensor, "batch prototypes"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Of a teacher's distribution, on average, and of their mean over the global batch.

    Both are near the logarithm of the number of prototypes when the teacher says nothing; the second is near 0 when it says
    the same of every image. Section 5.3.
    """
    mean = collectives.mean(targets.mean(0))
    return torch.special.entr(targets).sum(-1).mean(), torch.special.entr(mean).sum()


def warmed_up(start: float, end: float, progress: Float[Tensor, ""], warmup: float) -> Float[Tensor, ""]:
    """Linear from `start` to `end` over the share `warmup` of training: the temperature of a teacher."""
    return start + (end - start) * (progress / warmup).clamp(max=1)
