"""Views of several sizes through one network.

M. Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments" (2020), multi-crop.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def features(
    network: nn.Module, views: Sequence[Float[Tensor, "batch channels _ _"]]
) -> Float[Tensor, "views_times_batch features"]:
    """Of all views, in their order; neighbours of one size go through the network together."""
    groups = itertools.groupby(views, key=lambda view: view.shape[-1])
    return torch.cat([network(torch.cat(list(group))) for _, group in groups])
