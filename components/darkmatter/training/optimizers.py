"""The optimizer: AdamW (I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", 2019)."""

import torch
from torch import nn


def adamw(module: nn.Module, *, weight_decay: float) -> torch.optim.AdamW:
    """Matrices and filters decay; biases and the scales of norms, which have one dimension, do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
