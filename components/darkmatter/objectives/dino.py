"""DINO: M. Caron et al., "Emerging properties in self-supervised vision transformers" (2021),
https://arxiv.org/abs/2104.14294; authors' code: facebookresearch/dino, `main_dino.py` and `vision_transformer.py`.

Energy (inference):  F(x, y) = H(P_t(y), P_s(x)), the cross-entropy of the teacher's distribution over prototypes for y,
centred and sharpened, and the student's for x
Loss (training), equation 3:  mean of H(P_t(x), P_s(x')) over whole views x and all other views x', smaller ones included
Against collapse: asymmetry. The teacher is an average of past students that no gradient reaches; centring its scores
(equation 4) keeps one prototype from winning everywhere, a low temperature all from winning equally. Neither is energy.

`backbone` is the teacher's, which the paper evaluates. The authors' schedules go by epochs, these by the step.

Family: distillation. Choose it for vision transformers and long runs with small views; good nearest neighbours.
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
from darkmatter.parts import distillation, heads, teacher


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
        self.head = heads.PrototypeHead(backbone.num_features, config.head, config.prototypes)
        self.backbone.requires_grad_(False)
        self.teacher_head = teacher.copy_of(self.head)
        self.centre = distillation.Centre(config.prototypes)
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(()))

    def _student_scores(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows prototypes"]:
        return distillation.scores_of(self.head, features, trained=self.progress >= self.config.freeze)

    @torch.no_grad()
    def _teacher_scores(self, y: Images) -> Float[Tensor, "batch prototypes"]:
        return heads.full_precision(self.teacher_head(self.backbone(y)))

    def _targets(self, scores: Float[Tensor, "rows prototypes"]) -> Float[Tensor, "rows prototypes"]:
        config = self.config
        temperature = distillation.warmed_up(
            config.teacher_temperature_start, config.teacher_temperature, self.progress, config.warmup
        )
        return self.centre.targets(scores, temperature)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        targets = self._targets(self._teacher_scores(y))
        return distillation.cross_entropy(
            targets, self._student_scores(self.student(x)), self.config.student_temperature
        )

    def loss(self, views: Views, samples: Samples) -> Terms:
        whole, local = torch.cat(list(views[: self.num_views])), list(views[self.num_views :])
        teacher_scores = self._teacher_scores(whole)
        self.centre.see(teacher_scores)
        targets = self._targets(teacher_scores)
        features = [self.student(whole), *([self.student(torch.cat(local))] if local else [])]
        scores = self._student_scores(torch.cat(features))
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
        teacher.follow(self.teacher_head, self.head, momentum)
        self.centre.follow(self.config.centre_momentum)
        self.progress.fill_(progress)


def build(config: Config, backbone: Backbone, num_samples: int) -> DINO:
    return DINO(config, backbone)
