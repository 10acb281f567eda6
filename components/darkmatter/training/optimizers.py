"""The optimizers, their parameter groups, and what of them changes with the step.

AdamW: I. Loshchilov, F. Hutter, "Decoupled weight decay regularization" (2019), https://arxiv.org/abs/1711.05101; torch's.
LARS: Y. You, I. Gitman, B. Ginsburg, "Large batch training of convolutional networks" (2017),
https://arxiv.org/abs/1708.03888; timm's. For batches of thousands: each matrix steps in proportion to its own norm.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from darkmatter.backbones import Backbone

#: Tensors of the size of each parameter that an optimizer keeps.
MOMENTS = {"adamw": 2, "lars": 1}


def build(objective: nn.Module, name: str = "adamw", *, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """Matrices and filters decay; biases and the scales of norms, which have one dimension, do not.

    Args:
        objective: only what needs a gradient is trained.
        name: adamw or lars.
        layer_decay: each layer of a backbone has the learning rate of the layer above it times this.

    Raises:
        ValueError: `layer_decay` for a backbone that does not say what its layers are.
    """
    scales = dict(_layer_scales(objective, layer_decay)) if layer_decay < 1 else {}
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for decays in (True, False):  # every matrix before every bias: an order that checkpoints rely on
        for parameter in trained:
            if (parameter.dim() > 1) == decays:
                kinds.setdefault((scales.get(parameter, 1.0), decays), []).append(parameter)
    groups = [
        {"params": parameters, "scale": scale, "decays": decays, "weight_decay": 0.0}
        for (scale, decays), parameters in kinds.items()
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    from timm.optim import Lars

    # Biases and norms have steps of their own size, as in SimCLR's and BYOL's code.
    for group in groups:
        group["always_adapt"] = group["decays"]
    return Lars(groups, lr=0.0, momentum=0.9)


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Each group has its share of both."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
        group["weight_decay"] = weight_decay * group["decays"]


def _layer_scales(objective: nn.Module, layer_decay: float) -> Iterator[tuple[nn.Parameter, float]]:
    """For each parameter of a backbone: `layer_decay` to the power of the layers between it and the output, as in H. Bao et
    al., "BEiT" (2022), https://arxiv.org/abs/2106.08254."""
    from timm.models import group_parameters

    for backbone in (module for module in objective.modules() if isinstance(module, Backbone)):
        network = backbone.network
        matcher = getattr(network, "group_matcher", None)
        if matcher is None:
            raise ValueError(
                f"{type(network).__name__} has no group_matcher, which says what its layers are; set pretrain.layer_decay "
                "to 1"
            )
        named = dict(network.named_parameters())
        layers = group_parameters(network, matcher(coarse=False))
        for layer, names in layers.items():
            scale = layer_decay ** (len(layers) - layer)
            yield from zip(map(named.__getitem__, names), itertools.repeat(scale))
