"""BiGAN: J. Donahue, P. Krahenbuhl, T. Darrell, "Adversarial feature learning" (2017), https://arxiv.org/abs/1605.09782;
authors' code: jeffdonahue/bigan, `train_gan.py`.

Cost of a latent:    E(x, y, z) = |z - encoder(x)|^2 + |z - encoder(y)|^2: one latent has to explain both
Energy (inference):  F(x, y) = min over z of E = |encoder(x) - encoder(y)|^2 / 2
Loss (training), equation 3:  a discriminator tells pairs (x, encoder(x)) from pairs (generator(z), z), z ~ U(-1, 1);
encoder and generator are trained with its labels exchanged (section 3.4), which is stronger than minimising its payoff
Against collapse: the capacity of the latent. encoder(x) has to be distributed like the prior, so it cannot be constant.

The encoder ends in a batch norm with the prior's variance, which the paper's does not: without it the discriminator tells
the pairs by the size of z alone and the energy margin on the digits falls to 0.6, with it it rises to 0.84 (DECISIONS.md).

Family: latent variable. Choose it for the history: adversarial training is the least stable of all here.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, heads

_PRIOR_DEVIATION = 3**-0.5  # of U(-1, 1)


class Config(_Config):
    latent: int = Field(default=50, gt=0)
    """Numbers in z; 50 for digits (section 4.1), 200 for photographs."""
    generator_width: int = Field(default=32, gt=0)
    """Channels of the generator at full size; it starts with up to four times as many."""
    discriminator_width: int = Field(default=64, gt=0)
    """Channels of the discriminator's first layer; its later ones have up to four times as many."""


class Discriminator(nn.Module):
    """(images, latents) -> logits, positive for (x, encoder(x)). Without batch norm: it judges each pair by itself."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        width = config.discriminator_width
        self.image = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * width, 4 * width),
        )
        self.latent = nn.Linear(config.latent, 4 * width)
        self.joint = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Linear(4 * width, 4 * width), nn.LeakyReLU(0.2), nn.Linear(4 * width, 1)
        )

    def forward(self, images: Images, latents: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"]:
        return heads.full_precision(self.joint(self.image(images) + self.latent(latents))).squeeze(1)


def discrimination(encoded: Float[Tensor, " batch"], generated: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """-V(D, E, G), equation 3, from logits: what the discriminator minimises."""
    return F.softplus(-encoded).mean() + F.softplus(generated).mean()


class BiGAN(Objective):
    against_collapse: ClassVar[Mechanism] = "latent-capacity"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.latent = config.latent
        self.encoder = heads.projector([backbone.num_features, config.latent], last_norm=True)
        self.generator = decoders.ImageDecoder(
            config.latent, channels=backbone.channels, image_size=backbone.image_size, width=config.generator_width
        )
        self.discriminator = Discriminator(config, backbone.channels)

    def _encode(self, x: Images) -> Float[Tensor, "batch latent"]:
        return heads.full_precision(self.encoder(self.backbone(x))) * _PRIOR_DEVIATION

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        return (self._encode(x) - self._encode(y)).square().sum(1) / 2

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,) = views
        z = collectives.draw(lambda size: torch.rand(size, self.latent, device=x.device, dtype=x.dtype), len(x)) * 2 - 1
        encoded, generated = self._encode(x), heads.full_precision(self.generator(z)).sigmoid()
        judged = self.discriminator(x, encoded.detach()), self.discriminator(generated.detach(), z)
        discriminator = discrimination(*judged)
        # The same judge once more, whose own weights this term does not train; the labels are exchanged.
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        real = functional_call(self.discriminator, frozen, (x, encoded))
        fake = functional_call(self.discriminator, frozen, (generated, z))
        deception = discrimination(fake, real)
        return total(discriminator + deception, discrimination=discriminator, deception=deception)


def build(config: Config, backbone: Backbone, num_samples: int) -> BiGAN:
    return BiGAN(config, backbone)
