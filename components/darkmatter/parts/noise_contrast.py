"""Telling a sample's own score from those of noise, where a sum over all samples would cost too much.

M. Gutmann, A. Hyvarinen, "Noise-contrastive estimation" (2010), as Z. Wu et al. 2018 (https://arxiv.org/abs/1805.01978) put
it to use; the noise is drawn evenly from the n training samples, P_n = 1 / n.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, cat

from darkmatter import collectives


def nce(
    own: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch negatives"],
    constant: Float[Tensor, ""],
    num_samples: int,
) -> Float[Tensor, ""]:
    """Equations 6 and 7 of Wu et al.: -log h(own) - sum over m noise scores of log(1 - h(noise)), mean over the batch, with
    h = P / (P + m / n) and P = exp(score) / constant."""
    shift = constant.log() + math.log(noise.shape[1] / num_samples)
    return (F.softplus(shift - own) + F.softplus(noise - shift).sum(1)).mean()  # h = sigmoid(score - shift)


def partition(
    own: Float[Tensor, " batch"], noise: Float[Tensor, "batch negatives"], num_samples: int
) -> Float[Tensor, ""]:
    """Equation 8: the constant, from the scores of the global batch; the own ones count, as in the authors' code."""
    scores = cat([own[:, None], noise], dim=1).detach()
    return num_samples * collectives.mean(scores.exp().mean())
