"""The energy contract. One file a method, chosen by `objective.name`.

Every self-supervised method is an energy F(x, y), low where x and y are compatible (two views of one sample) and high
where they are not; methods differ in what keeps it from being low everywhere (collapse). After Y. LeCun and I. Misra,
"Self-supervised learning: the dark matter of intelligence" (2021).

An objective module defines `Config`, whose defaults are the paper's, and `build(config, backbone, num_samples) ->
Objective`; `num_samples` is the size of the training split, for methods that remember every sample.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from jaxtyping import Float, Int64
from torch import Tensor, nn

from darkmatter.backbones import Backbone
from darkmatter.backbones import Images as Images

Mechanism = Literal["contrastive", "regularised", "asymmetric", "clustering", "reconstruction", "latent-capacity"]
Samples = Int64[Tensor, " batch"]
Views = Sequence[Float[Tensor, "batch channels _ _"]]  # the smaller ones have other sizes than the whole ones
Terms = Mapping[str, Float[Tensor, ""]]


class Objective(nn.Module, abc.ABC):
    """A backbone and all else that a method needs. Everything that affects numbers is a parameter or a buffer.

    `backbone` is the network that downstream teams get: the one that the paper evaluates. Where that is a teacher, the
    network in training is another attribute.
    """

    against_collapse: ClassVar[Mechanism]
    """What keeps the energy from being low everywhere."""
    num_views: ClassVar[int] = 2
    """Views of each image that the loss takes."""
    takes_local_views: ClassVar[bool] = False
    """Whether smaller views may follow them (multi-crop)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def embed(self, x: Images) -> Float[Tensor, "batch features"]:
        """What downstream teams use. Pixels in [0, 1]."""
        return self.backbone(x)

    @abc.abstractmethod
    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        """Inference, in eval mode: a number for each pair, low where it is compatible. No pair affects another's."""

    @abc.abstractmethod
    def loss(self, views: Views, samples: Samples) -> Terms:
        """Training: `loss`, this rank's share of the global loss, and beside it each term by its name in the paper.

        Args:
            views: `num_views` views of each image, then the smaller ones if the method takes them. Pixels in [0, 1].
            samples: the number of each image in the training split.
        """

    def after_step(self, progress: float) -> None:
        """What changes after an optimizer step (a teacher, a queue, a temperature). `progress` goes from 0 to 1.

        What it needs of the loss before it, the loss leaves in an attribute. A step that is skipped changes nothing.
        """

    def forward(self, views: Views, samples: Samples) -> Terms:
        """`loss`, under the name that DistributedDataParallel calls."""
        return self.loss(views, samples)


def total(weighted: Tensor, **terms: Tensor) -> Terms:
    """The answer of `loss`: the sum that is trained, and each term beside it, for people only."""
    return {"loss": weighted, **{name: term.detach() for name, term in terms.items()}}
