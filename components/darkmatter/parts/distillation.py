"""A teacher's distribution over prototypes as the target of a student's: self-distillation without labels.

M. Caron et al., "Emerging properties in self-supervised vision transformers" (2021), https://arxiv.org/abs/2104.14294.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.parts import heads


class Centre(nn.Module):
    """Equation 4: a running mean of the teacher's scores over global batches, so that no prototype can win everywhere."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(prototypes))
        self._newest: Tensor | None = None

    @torch.no_grad()
    def targets(
        self, scores: Float[Tensor, "*batch prototypes"], temperature: Float[Tensor, ""]
    ) -> Float[Tensor, "*batch prototypes"]:
        """The teacher's distributions, centred and sharpened."""
        return ((scores - self.mean) / temperature).softmax(-1)

    def see(self, scores: Float[Tensor, "*batch prototypes"]) -> None:
        """Keeps what `follow` will need of this step."""
        self._newest = scores.detach().flatten(0, -2).mean(0)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        if self._newest is not None:
            self.mean.lerp_(collectives.mean(self._newest).to(self.mean.dtype), 1 - momentum)
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


def scores_of(
    head: heads.PrototypeHead, x: Float[Tensor, "*batch features"], *, trained: Tensor
) -> Float[Tensor, "*batch prototypes"]:
    """The scores of a student's head. Unless `trained`, the gradient of its prototypes is zero.

    Zero and not none, which DistributedDataParallel would wait for.
    """
    fixed = head.prototypes.weight.detach()
    weight = fixed + (head.prototypes.weight - fixed) * trained
    return heads.full_precision(torch.func.functional_call(head, {"prototypes.weight": weight}, (x,)))
