"""DINO: M. Caron et al., "Emerging properties in self-supervised vision transformers" (2021),
https://arxiv.org/abs/2104.14294; authors' code: facebookresearch/dino, `main_dino.py` and `vision_transformer.py`.

Energy (inference):  F(x, y) = H(P_t(y), P_s(x)), the cross-entropy of the teacher's distribution over prototypes for y,
centred and sharpened, and the student's for x
Loss (training), equation 3:  mean of H(P_t(x), P_s(x')) over whole views x and all other views x', smaller ones included
Against collapse: asymmetry. The teacher is an average of past students that no gradient reaches; centring its scores
(equation 4) keeps one prototype from winning everywhere, a low temperature all from winning equally. Neither is energy.

`backbone` is the teacher's, which the paper evaluates. The authors' schedules go by epochs, these by the step.

Family: distillation. Choose it for vision transformers and long runs with small views. In a few hundred steps on small
data it does not get going here, lightly's neither.
"""

import copy
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, Views, total
from darkmatter.params import Config as _Config
from darkmatter.parts import distillation, multi_crop, teacher


class Config(_Config):
    head: list[int] = Field(default=[2048, 2048, 256], min_length=1)
    """Hidden features and bottleneck of the head; appendix C."""
    prototypes: int = Field(default=65536, gt=1)
    """K; appendix C."""
    student_temperature: float = Field(default=0.1, gt=0)
    """tau_s of equation 1; section 3.2."""
    teacher_temperature: float = Field(default=0.07, gt=0)
    """tau_t after its warm-up; section 3.2. 0.04 does for short runs."""
    teacher_temperature_start: float = Field(default=0.04, gt=0)
    """tau_t at the start; section 3.2."""
    warmup: float = Field(default=0.3, gt=0, le=1)
    """Share of training over which tau_t gets there: 30 epochs (section 3.2) of 100."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; it rises to 1 along a cosine. Section 3.1. Short runs want less: 0.99 and below."""
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    """m of equation 4; appendix D."""
    freeze: float = Field(default=0.01, ge=0, le=1)
    """Share of training for which the prototypes stay as they started: the first of 100 epochs in the authors' code."""


class DINO(Objective):
    against_collapse: ClassVar[Mechanism] = "asymmetric"
    takes_local_views: ClassVar[bool] = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.config = config
        self.student = copy.deepcopy(backbone)
        self.backbone.requires_grad_(False)
        self.head = distillation.Head(backbone.num_features, config.head, config.prototypes)
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(()))

    @torch.no_grad()
    def _targets(self, y: Images) -> Float[Tensor, "batch prototypes"]:
        config = self.config
        temperature = distillation.warmed_up(
            config.teacher_temperature_start, config.teacher_temperature, self.progress, config.warmup
        )
        return self.head.targets(self.backbone(y), temperature)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        scores = self.head.scores(self.student(x))
        return distillation.cross_entropy(self._targets(y), scores, self.config.student_temperature)

    def loss(self, views: Views, samples: Samples) -> Terms:
        targets = self._targets(torch.cat(list(views[: self.num_views])))
        features = multi_crop.features(self.student, views)
        scores = self.head.scores(features, trained=self.progress >= self.config.freeze)
        cross_entropy = distillation.across_views(targets, scores, len(views), self.config.student_temperature)
        entropy, entropy_of_mean = distillation.entropies(targets)
        return total(
            cross_entropy,
            cross_entropy=cross_entropy,
            teacher_entropy=entropy,
            entropy_of_mean_teacher=entropy_of_mean,
        )

    def after_step(self, progress: float) -> None:
        momentum = teacher.cosine_momentum(self.config.momentum, progress)
        teacher.follow(self.backbone, self.student, momentum)
        self.head.follow(momentum, self.config.centre_momentum)
        self.progress.fill_(progress)


def build(config: Config, backbone: Backbone, num_samples: int) -> DINO:
    return DINO(config, backbone)
