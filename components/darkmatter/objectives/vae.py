"""VAE: D. Kingma, M. Welling, "Auto-encoding variational Bayes" (2014), https://arxiv.org/abs/1312.6114; authors' code:
dpkingma/nips14-ssl, `anglepy/models/VAE_Z_X.py`. With beta: I. Higgins et al., "beta-VAE" (2017).

A latent z explains an image; three functions, which are easily mixed up:
Cost of a latent:    E(y, z) = -log p(y | z), the cross-entropy of y and decoder(z), less the entropy of y
Energy (inference):  F(x, y) = E(y, z) at z = mean of q(z | x), an upper bound of the minimum over z that costs no search
Loss (training), equation 10, with beta:  expectation of E(x, z) over q(z | x)  +  beta KL(q(z | x), N(0, I))
Against collapse: the capacity of the latent. The KL is the regulariser of z: it limits what z may say, so that the
decoder cannot be cheap for everything. With a huge beta z says nothing (posterior collapse) and the energy is flat.

Family: latent variable. Choose it when you want a generative model and a smooth low-dimensional code.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, heads


class Config(_Config):
    latent: int = Field(default=20, gt=0)
    """Numbers in z; figure 2 has 3 to 200 for digits."""
    beta: float = Field(default=1.0, ge=0)
    """Weight of the regulariser of z; 1 is the bound of the VAE, beta-VAE has more."""
    decoder_width: int = Field(default=32, gt=0)
    """Channels of the decoder at full size; it starts with up to four times as many."""


def kl_divergence(
    mean: Float[Tensor, "batch latent"], log_variance: Float[Tensor, "batch latent"]
) -> Float[Tensor, ""]:
    """KL(N(mean, variance), N(0, I)), appendix B, summed over the latent, mean over images; nats."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()


class VAE(Objective):
    against_collapse: ClassVar[Mechanism] = "latent-capacity"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.beta = config.beta
        self.posterior = nn.Linear(backbone.num_features, 2 * config.latent)
        self.decoder = decoders.ImageDecoder(
            config.latent, channels=backbone.channels, image_size=backbone.image_size, width=config.decoder_width
        )

    def _infer(self, x: Images) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Mean and logarithm of the variance of q(z | x)."""
        mean, log_variance = heads.full_precision(self.posterior(self.backbone(x))).chunk(2, dim=1)
        return mean, log_variance

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        mean, _ = self._infer(x)
        return decoders.deviance(heads.full_precision(self.decoder(mean)), y)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,) = views
        mean, log_variance = self._infer(x)
        noise = collectives.draw(
            lambda size: torch.randn(size, mean.shape[1], device=x.device, dtype=mean.dtype), len(x)
        )
        logits = heads.full_precision(self.decoder(mean + (log_variance / 2).exp() * noise))
        reconstruction = decoders.cross_entropy(logits, x).mean()
        kl = kl_divergence(mean, log_variance)
        return total(reconstruction + self.beta * kl, reconstruction=reconstruction, kl=kl)


def build(config: Config, backbone: Backbone, num_samples: int) -> VAE:
    return VAE(config, backbone)
