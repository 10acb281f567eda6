"""The energy contract. One file a method, chosen by `objective.name`.

Every self-supervised method is an energy F(x, y), low where x and y are compatible (two views of one sample) and high
where they are not; methods differ in what keeps it from being low everywhere (collapse). After Y. LeCun and I. Misra,
"Self-supervised learning: the dark matter of intelligence" (2021).

An objective module defines `Config`, whose defaults are the paper's, and `build(config, backbone) -> Objective`.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from darkmatter.backbones import Backbone

Mechanism = Literal["contrastive", "regularised", "asymmetric", "clustering", "reconstruction", "latent-capacity"]
Images = Float[Tensor, "batch channels size size"]


class Objective(nn.Module, abc.ABC):
    """A backbone and all else that a method needs. Everything that affects numbers is a parameter or a buffer."""

    against_collapse: ClassVar[Mechanism]
    """What keeps the energy from being low everywhere."""

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
    def loss(self, views: Sequence[Images]) -> Mapping[str, Float[Tensor, ""]]:
        """Training: `loss`, this rank's share of the global loss, and beside it each term by its name in the paper."""

    def after_step(self, progress: float) -> None:
        """What changes after an optimizer step (a teacher, a queue, a temperature). `progress` goes from 0 to 1."""

    def forward(self, views: Sequence[Images]) -> Mapping[str, Float[Tensor, ""]]:
        """`loss`, under the name that DistributedDataParallel calls."""
        return self.loss(views)
