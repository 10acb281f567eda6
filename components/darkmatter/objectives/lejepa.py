"""LeJEPA: R. Balestriero, Y. LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics" (2025),
https://arxiv.org/abs/2511.08544; authors' code: rbalestr-lab/lejepa, `MINIMAL.md` and `lejepa/univariate/epps_pulley.py`.

Energy (inference):  F(x, y) = |g(f(x)) - g(f(y))|^2 / D
Loss (training):  (1 - lambda) prediction + lambda SIGReg; prediction is the mean over views of the squared distance, over D,
to the centre of the whole views
Against collapse: SIGReg asks of every view's projections that they look like a standard normal along random directions, by
the test of Epps and Pulley, so that they can be neither constant nor flat. It is no energy; nor are there a teacher, a
stop-gradient or a predictor.

The paper integrates the test from -5 to 5; the authors' code, and this, from 0 to 3 and doubles, which is the same by
symmetry but for the ends. `MINIMAL.md` has no smaller views: its centre is that of all of them.

Family: redundancy reduction. Choose it when you want one dial, no teacher and no schedule.
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
from darkmatter.parts import heads, multi_crop

_KNOTS, _LAST_KNOT = 17, 3.0  # of the integral over t, in the authors' code


class Config(_Config):
    regulariser: float = Field(default=0.02, ge=0, le=1)
    """lambda, the only hyperparameter of the method, says the paper; the value of `MINIMAL.md`."""
    slices: int = Field(default=256, gt=0)
    """Random directions a step; `MINIMAL.md`. The authors' README has 1024."""
    projector: list[int] = Field(default=[2048, 2048, 128], min_length=1)
    """Hidden and output features of g; `MINIMAL.md`."""


def prediction(
    projections: Float[Tensor, "views batch dim"], whole: Float[Tensor, "whole batch dim"]
) -> Float[Tensor, ""]:
    """How far the views of an image are from the centre of its whole views."""
    return (whole.mean(0) - projections).square().mean()


@heads.exact
def sigreg(projections: Float[Tensor, "views batch dim"], directions: Float[Tensor, "dim slices"]) -> Float[Tensor, ""]:
    """Sketched isotropic Gaussian regularisation: the statistic of Epps and Pulley, mean over directions and views.

    N, the global batch, times the integral over t of |E exp(i t u) - exp(-t^2 / 2)|^2 exp(-t^2 / 2), by trapezoids; E is
    the mean over the global batch of a view, u the projections onto a direction.
    """
    t = torch.linspace(0, _LAST_KNOT, _KNOTS, dtype=projections.dtype, device=projections.device)
    angles = (projections @ directions)[..., None] * t  # (views, batch, slices, knots)
    cosine, sine = collectives.mean(torch.stack([angles.cos().mean(1), angles.sin().mean(1)]))
    normal = torch.exp(-t.square() / 2)  # both the characteristic function of the standard normal and the window
    error = (cosine - normal).square() + sine.square()
    samples = projections.shape[1] * collectives.world_size()
    return (2 * torch.trapezoid(error * normal, t) * samples).mean()


class LeJEPA(Objective):
    against_collapse: ClassVar[Mechanism] = "regularised"
    takes_local_views: ClassVar[bool] = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.config = config
        self.projector = heads.projector([backbone.num_features, *config.projector], last_bias=True)

    def _project(self, views: Views) -> Float[Tensor, "views batch dim"]:
        """The projector once for all, as in `MINIMAL.md`: batch norms see it."""
        projections = self.projector(multi_crop.features(self.backbone, views))
        return heads.full_precision(projections).unflatten(0, (len(views), -1))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        first, second = self._project([x, y])
        return (first - second).square().mean(1)

    def loss(self, views: Views, samples: Samples) -> Terms:
        projections = self._project(views)
        whole = projections[: self.num_views]
        draw = torch.randn(projections.shape[2], self.config.slices, dtype=whole.dtype, device=whole.device)
        distance, statistic = prediction(projections, whole), sigreg(projections, F.normalize(draw, dim=0))
        weighted = (1 - self.config.regulariser) * distance + self.config.regulariser * statistic
        return total(weighted, prediction=distance, sigreg=statistic)


def build(config: Config, backbone: Backbone, num_samples: int) -> LeJEPA:
    return LeJEPA(config, backbone)
