"""SwAV: M. Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments" (2020),
https://arxiv.org/abs/2006.09882; authors' code: facebookresearch/swav, `main_swav.py`.

Energy (inference):  F(x, y) = min over codes k of -log p_k(x) - log p_k(y), both views having the same code; p is the
softmax of the cosines of g(f(x)) and the prototypes, over a temperature
Loss (training), equations 1, 2 and 6:  -sum over k of q_k(x) log p_k(y), mean over whole views x and all other views y
Against collapse: the codes q of a batch (equations 3 to 5) use every prototype equally, which Sinkhorn's iterations see to.
That constraint on the latent is neither energy nor loss; without it one prototype takes everything.

The authors normalise the prototypes' weights in place before each step; here they are normalised where they are used. Codes
are balanced over the global batch, with the queue once it is full, as in the authors' code.

Family: clustering. Choose it for long runs on data with about equally large groups; smaller views help it. A few
hundred steps are not enough.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, Views, total
from darkmatter.params import Config as _Config
from darkmatter.parts import heads, memory, multi_crop


class Config(_Config):
    temperature: float = Field(default=0.1, gt=0)
    """tau of equation 2; appendix A.1."""
    epsilon: float = Field(default=0.05, gt=0)
    """Smoothness of the codes, equation 3; appendix A.1."""
    sinkhorn_iterations: int = Field(default=3, gt=0)
    """Section 3.1 finds 3 enough."""
    prototypes: int = Field(default=3000, gt=1)
    """K; appendix A.1."""
    projector: list[int] = Field(default=[2048, 128], min_length=1)
    """Hidden and output features of g; appendix A.1."""
    queue: int = Field(default=0, ge=0)
    """Earlier features that are given codes with each batch; 0 for none, 3840 for batches of 256 (section 4.3)."""
    queue_from: float = Field(default=0.075, ge=0, le=1)
    """Share of training after which the queue is used; 15 of 200 epochs in the authors' run with batches of 256."""
    freeze: float = Field(default=0.0025, ge=0, le=1)
    """Share of training for which the prototypes stay as they started; the first of 400 epochs in the authors' runs."""


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "rows prototypes"], epsilon: float, iterations: int
) -> Float[Tensor, "rows prototypes"]:
    """Equation 5: codes whose rows sum to 1 while all prototypes get about the same share of the rows.

    Takes turns at dividing by the sum over rows and over prototypes; in logarithms, where a small epsilon does no harm.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def prediction(
    scores: Float[Tensor, "batch prototypes"], codes: Float[Tensor, "batch prototypes"], temperature: float
) -> Float[Tensor, ""]:
    """Equation 2: the cross-entropy of one view's codes and another view's softmax."""
    return -(codes * F.log_softmax(scores / temperature, dim=1)).sum(1).mean()


class SwAV(Objective):
    against_collapse: ClassVar[Mechanism] = "clustering"
    takes_local_views: ClassVar[bool] = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.config = config
        features = config.projector[-1]
        self.projector = heads.projector([backbone.num_features, *config.projector], last_bias=True)
        self.prototypes = heads.Prototypes(features, config.prototypes)
        self.queue = None
        if config.queue:
            self.queue = memory.Queue(config.queue, 2 * features)  # both whole views of a sample, side by side
            self.queue.rows.zero_()  # so that one can tell when it is full
        self.progress: Tensor
        self.register_buffer("progress", torch.zeros(()))
        self._newest: tuple[Tensor, ...] | None = None

    def _project(self, views: Views) -> Float[Tensor, "views_times_batch features"]:
        """The backbone once for each size, the projector once for all, as the authors do: batch norms see it."""
        features = multi_crop.features(self.backbone, views)
        return F.normalize(heads.full_precision(self.projector(features)), dim=1)

    def _scores(self, z: Float[Tensor, "rows features"]) -> Float[Tensor, "rows prototypes"]:
        return heads.full_precision(self.prototypes(z, trained=self.progress >= self.config.freeze))

    @torch.no_grad()
    def _codes(self, number: int, z: Float[Tensor, "batch features"]) -> Float[Tensor, "batch prototypes"]:
        """Of this rank's rows of whole view `number`, balanced over the global batch and the queue."""
        rows = everyone = collectives.gather(z)
        if self.queue is not None and self.progress >= self.config.queue_from and self.queue.rows.any(1).all():
            rows = torch.cat([self.queue.rows.chunk(2, dim=1)[number], everyone])
        codes = sinkhorn(self._scores(rows), self.config.epsilon, self.config.sinkhorn_iterations)
        return codes[-len(everyone) :].chunk(collectives.world_size())[collectives.rank()]

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        scores_x, scores_y = (self._scores(self._project([view])) for view in (x, y))
        return heads.same_prototype(scores_x, scores_y, self.config.temperature)

    def loss(self, views: Views, samples: Samples) -> Terms:
        z = self._project(views)
        scores = self._scores(z).chunk(len(views))
        self._newest = whole_views = z.detach().chunk(len(views))[: self.num_views]
        predictions = []
        for number, whole in enumerate(whole_views):
            codes = self._codes(number, whole)
            others = [*scores[:number], *scores[number + 1 :]]
            predictions += [prediction(other, codes, self.config.temperature) for other in others]
        swapped = torch.stack(predictions).mean()
        return total(swapped, swapped_prediction=swapped)

    def after_step(self, progress: float) -> None:
        if self.queue is not None and self._newest is not None:
            self.queue.push(torch.cat(self._newest, dim=1))
        self._newest = None
        self.progress.fill_(progress)


def build(config: Config, backbone: Backbone, num_samples: int) -> SwAV:
    return SwAV(config, backbone)
