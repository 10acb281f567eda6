"""iBOT: J. Zhou et al., "iBOT: image BERT pre-training with online tokenizer" (2022),
https://arxiv.org/abs/2111.07832; authors' code: bytedance/ibot, `main_ibot.py`, `loader.py` and `models/head.py`.

Energy (inference):  F(x, y) = H(P_t(y), P_s(x)) of whole images, as in DINO (https://arxiv.org/abs/2104.14294)
Loss (training), section 3.1:  lambda1 L_CLS + lambda2 L_MIM. L_CLS is DINO's loss, the student's whole views having hidden
patches; L_MIM is the mean over hidden patches i of H(P_t(u_i), P_s(u'_i)), what the teacher says of a patch that it sees and
the student of the same patch that it does not see.
Against collapse: asymmetry, a teacher with centred and sharpened distributions; one centre for images, one for patches.
With `koleo` (DINOv2, https://arxiv.org/abs/2304.07193; facebookresearch/dinov2, `dinov2/loss/koleo_loss.py`) a regulariser
as well, which spreads the features of a batch over the sphere. Neither is energy.

Hidden patches show the mean colour, which stands for the mask token: after the patch embedding of a vision transformer it is
that layer's bias, a learned vector. The heads of images and patches are separate: here their inputs may differ in width,
where the authors share all but, by option, the prototypes. As in the authors' code an image without hidden patches counts
as zero in the mean of L_MIM. KoLeo looks for neighbours in the global batch, the authors' in that of each GPU.

Family: distillation. Choose it for vision transformers and long runs, when both the image and its patches matter.
"""

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, Views, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, distillation, heads, masks, multi_crop, teacher


class Config(_Config):
    head: list[int] = Field(default=[2048, 2048, 256], min_length=1)
    """Hidden features and bottleneck of each head; section 3.2."""
    prototypes: int = Field(default=8192, gt=1)
    """Outputs of each head; section 3.2."""
    lambda1: float = Field(default=1.0, ge=0)
    """Weight of L_CLS; section 3.1."""
    lambda2: float = Field(default=1.0, ge=0)
    """Weight of L_MIM; section 3.1."""
    koleo: float = Field(default=0.0, ge=0)
    """Weight of the KoLeo regulariser: none in iBOT, 0.1 in DINOv2."""
    masked_images: float = Field(default=0.5, ge=0, le=1)
    """Share of whole views with hidden patches; section 3.2."""
    mask_share: list[float] = Field(default=[0.1, 0.5], min_length=2, max_length=2)
    """Least and largest share of such a view that is hidden, in blocks; section 3.2."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Of both heads; the authors' code."""
    teacher_temperature: float = Field(default=0.07, gt=0)
    """For images, after the warm-up; the authors' runs."""
    patch_teacher_temperature: float = Field(default=0.07, gt=0)
    """For patches, after the warm-up; the authors' runs."""
    teacher_temperature_start: float = Field(default=0.04, gt=0)
    """For both, at the start; the authors' runs."""
    warmup: float = Field(default=0.3, gt=0, le=1)
    """Share of training over which they get there: 30 of 100 epochs in the authors' code."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; it rises to 1 along a cosine. The authors' code. Short runs want less."""
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    """Of both centres; the authors' code."""
    freeze: float = Field(default=0.01, ge=0, le=1)
    """Share of training for which the prototypes stay as they started: the first of 100 epochs in the authors' code."""


def masked_image_modelling(
    targets: Float[Tensor, "batch patches prototypes"],
    scores: Float[Tensor, "batch patches prototypes"],
    hidden: Bool[Tensor, "batch patches"],
    temperature: float,
) -> Float[Tensor, ""]:
    """L_MIM: mean over the hidden patches of each image, then over images."""
    distances = distillation.cross_entropy(targets, scores, temperature) * hidden
    return (distances.sum(1) / hidden.sum(1).clamp(min=1)).mean()


@heads.exact
def koleo(features: Float[Tensor, "batch features"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of the distance to the nearest other one on the unit sphere.

    A. Sablayrolles et al., "Spreading vectors for similarity search" (2019), https://arxiv.org/abs/1806.03198.
    """
    unit = F.normalize(features, dim=1)
    nearest = (unit @ unit.T).detach().fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(unit, unit[nearest], eps=1e-8) + 1e-8).log().mean()


class IBOT(Objective):
    against_collapse: ClassVar[Mechanism] = "asymmetric"
    takes_local_views: ClassVar[bool] = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        decoders.need_patches(backbone, 4, method="ibot")
        self.config = config
        self.student = copy.deepcopy(backbone)
        self.backbone.requires_grad_(False)
        self.head = distillation.Head(backbone.num_features, config.head, config.prototypes)
        self.patch_head = distillation.Head(backbone.token_features, config.head, config.prototypes)
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(()))

    def _temperature(self, end: float) -> Float[Tensor, ""]:
        config = self.config
        return distillation.warmed_up(config.teacher_temperature_start, end, self.progress, config.warmup)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        with torch.no_grad():
            targets = self.head.targets(self.backbone(y), self._temperature(self.config.teacher_temperature))
        scores = self.head.scores(self.student(x))
        return distillation.cross_entropy(targets, scores, self.config.student_temperature)

    def _hide(self, view: Images) -> Bool[Tensor, "batch patches"]:
        """Patches to hide from the student, in some of the images."""
        batch, device = len(view), view.device
        chosen = collectives.draw(lambda size: torch.rand(size, device=device), batch) < self.config.masked_images
        return masks.blocks(batch, self.backbone.grid, self.config.mask_share, device) & chosen[:, None]

    @torch.no_grad()
    def _targets(
        self, whole: Images
    ) -> tuple[Float[Tensor, "batch prototypes"], Float[Tensor, "batch patches prototypes"]]:
        """What the teacher says of images and of their patches."""
        pooled, tokens = self.backbone.both(whole)
        return (
            self.head.targets(pooled, self._temperature(self.config.teacher_temperature)),
            self.patch_head.targets(tokens, self._temperature(self.config.patch_teacher_temperature)),
        )

    def loss(self, views: Views, samples: Samples) -> Terms:
        config, trained = self.config, self.progress >= self.config.freeze
        whole, local = list(views[: self.num_views]), views[self.num_views :]
        targets, patch_targets = self._targets(torch.cat(whole))
        hidden = torch.cat([self._hide(view) for view in whole])
        pooled, tokens = self.student.both(self.student.hide(torch.cat(whole), hidden))
        features = torch.cat([pooled, *([multi_crop.features(self.student, local)] if local else [])])
        scores = self.head.scores(features, trained=trained)
        patch_scores = self.patch_head.scores(tokens, trained=trained)

        l_cls = distillation.across_views(targets, scores, len(views), config.student_temperature)
        l_mim = masked_image_modelling(patch_targets, patch_scores, hidden, config.student_temperature)
        weighted, terms = config.lambda1 * l_cls + config.lambda2 * l_mim, {"cls": l_cls, "mim": l_mim}
        if config.koleo:
            first, second = map(collectives.gather, heads.full_precision(pooled).chunk(2))
            terms["koleo"] = koleo(first) + koleo(second)
            weighted = weighted + config.koleo * terms["koleo"]
        entropy, entropy_of_mean = distillation.entropies(targets)
        return total(weighted, **terms, teacher_entropy=entropy, entropy_of_mean_teacher=entropy_of_mean)

    def after_step(self, progress: float) -> None:
        momentum = teacher.cosine_momentum(self.config.momentum, progress)
        teacher.follow(self.backbone, self.student, momentum)
        self.head.follow(momentum, self.config.centre_momentum)
        self.patch_head.follow(momentum, self.config.centre_momentum)
        self.progress.fill_(progress)


def build(config: Config, backbone: Backbone, num_samples: int) -> IBOT:
    return IBOT(config, backbone)
