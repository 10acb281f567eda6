"""MoCo, versions 2 and 3. Version 2: K. He et al., "Momentum contrast for unsupervised visual representation learning"
(2019), https://arxiv.org/abs/1911.05722, with the head and temperature of X. Chen et al., "Improved baselines with
momentum contrastive learning" (2020), https://arxiv.org/abs/2003.04297; authors' code: facebookresearch/moco,
`moco/builder.py`. Version 3: X. Chen, S. Xie, K. He, "An empirical study of training self-supervised vision transformers"
(2021), https://arxiv.org/abs/2104.02057; authors' code: facebookresearch/moco-v3, `moco/builder.py`.

Energy (inference):  F(x, y) = -cos(q(x), k(y)) / temperature, from query to key
Loss (training), equation 1, N images:  mean of -log( exp(-F(x, y)) / (exp(-F(x, y)) + sum over other keys of exp(-F)) )
Against collapse: other images' keys are pushed to a higher energy. Version 2 remembers them in a queue; version 3 takes
those of the global batch, both ways round. Keys come from a teacher that no gradient reaches, an average of past weights.

Version 3 multiplies its loss by 2 temperature, as the authors do. The shuffling of batch norm (2019, section 3.3) is left
out: it decides which images share a rank's statistics, and here statistics are of the global batch on every rank.

Family: contrastive. Choose it when batches are small and runs long: the negatives come from a queue of earlier batches.
It is slow to start.
"""

import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads, memory, teacher


class Config(_Config):
    version: Literal[2, 3] = 2
    """2: a queue of keys. 3: the keys of the batch, a predictor, both ways round; wants large batches. The other
    defaults are those of version 2."""
    temperature: float = Field(default=0.2, gt=0)
    """2020, table 1. Version 3: 0.2 with vision transformers, 1.0 with a ResNet-50."""
    momentum: float = Field(default=0.999, ge=0, le=1)
    """Of the teacher; 2019, section 3.2. Version 3: 0.99, and it rises to 1 along a cosine. Short runs want less."""
    projector: list[int] = Field(default=[2048, 128], min_length=1)
    """Hidden and output features of the head; 2020, section 3. Version 3: 4096 and 256, with batch norm."""
    queue: int = Field(default=65536, gt=0)
    """Keys that version 2 remembers; 2019, section 4. Version 3 has no queue."""
    predictor: int = Field(default=4096, gt=0)
    """Hidden features of the predictor of version 3; 2021, section 3. Version 2 has no predictor."""


@heads.exact
def against_queue(
    query: Float[Tensor, "batch features"],
    key: Float[Tensor, "batch features"],
    queue: Float[Tensor, "length features"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Equation 1 of 2019: each query's own key against the remembered ones. The arguments have unit length."""
    own = (query * key).sum(1, keepdim=True)
    logits = torch.cat([own, query @ queue.to(query.dtype).T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


@heads.exact
def against_batch(
    query: Float[Tensor, "batch features"], key: Float[Tensor, "batch features"], temperature: float
) -> Float[Tensor, ""]:
    """Algorithm 1 of 2021: each query's own key against the other keys of the global batch, times 2 temperature."""
    logits = query @ collectives.gather(key).T / temperature
    place = collectives.rank() * len(query) + torch.arange(len(query), device=query.device)
    return 2 * temperature * F.cross_entropy(logits, place)


class _MoCo(Objective):
    against_collapse: ClassVar[Mechanism] = "contrastive"

    def __init__(self, config: Config, backbone: Backbone, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__(backbone)
        self.temperature, self.momentum = config.temperature, config.momentum
        self.projector, self.predictor = projector, predictor
        self.teacher = teacher.copy_of(nn.Sequential(backbone, projector))

    def _query(self, x: Images) -> Float[Tensor, "batch features"]:
        return F.normalize(heads.full_precision(self.predictor(self.projector(self.backbone(x)))), dim=1)

    @torch.no_grad()
    def _key(self, y: Images) -> Float[Tensor, "batch features"]:
        return F.normalize(heads.full_precision(self.teacher(y)), dim=1)

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return -(self._query(x) * self._key(y)).sum(1) / self.temperature

    def _follow(self, momentum: float) -> None:
        teacher.follow(self.teacher, nn.Sequential(self.backbone, self.projector), momentum)


class MoCo2(_MoCo):
    def __init__(self, config: Config, backbone: Backbone) -> None:
        widths = [backbone.num_features, *config.projector]
        super().__init__(config, backbone, _perceptron(widths), nn.Identity())
        self.queue = memory.Queue(config.queue, widths[-1])
        self.keys: Tensor | None = None

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        x, y = views
        self.keys = self._key(y)
        contrast = against_queue(self._query(x), self.keys, self.queue.rows, self.temperature)
        return total(contrast, contrast=contrast)

    def after_step(self, progress: float) -> None:
        self._follow(self.momentum)
        if self.keys is not None:
            self.queue.push(self.keys)
            self.keys = None


class MoCo3(_MoCo):
    def __init__(self, config: Config, backbone: Backbone) -> None:
        features = config.projector[-1]
        projector = heads.projector([backbone.num_features, *config.projector], last_norm=True)
        predictor = heads.projector([features, config.predictor, features], last_norm=True)
        super().__init__(config, backbone, projector, predictor)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        x, y = views
        there = against_batch(self._query(x), self._key(y), self.temperature)
        back = against_batch(self._query(y), self._key(x), self.temperature)
        return total(there + back, there=there, back=back)

    def after_step(self, progress: float) -> None:
        self._follow(teacher.cosine_momentum(self.momentum, progress))


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, without batch norm: the head of version 2."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def build(config: Config, backbone: Backbone, num_samples: int) -> MoCo2 | MoCo3:
    return MoCo2(config, backbone) if config.version == 2 else MoCo3(config, backbone)
