"""VQ-VAE: A. van den Oord, O. Vinyals, K. Kavukcuoglu, "Neural discrete representation learning" (2017),
https://arxiv.org/abs/1711.00937; authors' code: google-deepmind/sonnet, `sonnet/src/nets/vqvae.py` (VectorQuantizerEMA).
Dead codes are restarted as in P. Dhariwal et al., "Jukebox" (2020), section 3.2.

Cost of a latent:    E(y, z) = |y - decoder(z)|^2 / D, z a code of a finite book at each patch, y normalised
Energy (inference):  F(x, y) = E(y, z) at the codes nearest to encoder(x), an upper bound of the minimum over all z
Loss (training), equation 3:  E(x, z)  +  beta |encoder(x) - stop(z)|^2 / D
Against collapse: the capacity of the latent, log2(codes) bits a patch. The second term is the regulariser of the encoder,
which keeps near the book; the book follows by a moving average (appendix A.1) instead of a third term.

Family: latent variable. Choose it when you want discrete codes, a tokenizer for what comes next.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor, nn

from darkmatter import collectives
from darkmatter.backbones import Backbone
from darkmatter.objectives import Images, Mechanism, Objective, Samples, Terms, total
from darkmatter.params import Config as _Config
from darkmatter.parts import decoders, heads

_SMOOTHING = 1e-5  # Laplace smoothing of the counts, in the authors' code


class Config(_Config):
    codes: int = Field(default=512, gt=0)
    """K, in the book; section 4.1."""
    features: int = Field(default=64, gt=0)
    """Numbers in a code; 64 in the authors' code."""
    commitment: float = Field(default=0.25, ge=0)
    """beta of equation 3; section 3.2."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """gamma of the moving averages; appendix A.1."""
    restart_below: float = Field(default=0.01, ge=0)
    """A code with a smaller average count a step starts again at a random encoding; 0 never restarts. 1.0 in Jukebox."""
    decoder_width: int = Field(default=128, gt=0)
    """Channels of the decoder."""


class Book(nn.Module):
    """K vectors that follow the encodings nearest to them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vectors: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.register_buffer("vectors", torch.randn(config.codes, config.features))
        self.register_buffer("counts", torch.ones(config.codes))
        self.register_buffer("sums", self.vectors.clone())

    @heads.exact
    def nearest(self, z: Float[Tensor, "many features"]) -> Int64[Tensor, " many"]:
        distance = self.vectors.square().sum(1) - 2 * z @ self.vectors.T
        return distance.argmin(1)

    @torch.no_grad()
    def follow(self, z: Float[Tensor, "many features"]) -> None:
        """Equations 6 to 8 of appendix A.1 on the encodings of the global batch, then restarts."""
        z, config = collectives.gather(z), self.config
        chosen = F.one_hot(self.nearest(z), config.codes).to(z.dtype)
        self.counts.lerp_(chosen.sum(0), 1 - config.decay)
        self.sums.lerp_(chosen.T @ z, 1 - config.decay)
        dead = self.counts < config.restart_below
        fresh = z[torch.randint(len(z), (config.codes,), device=z.device)]
        self.sums.copy_(torch.where(dead[:, None], fresh, self.sums))
        self.counts.masked_fill_(dead, 1.0)
        everything = self.counts.sum()
        smooth = (self.counts + _SMOOTHING) / (everything + config.codes * _SMOOTHING) * everything
        self.vectors.copy_(self.sums / smooth[:, None])


class VQVAE(Objective):
    against_collapse: ClassVar[Mechanism] = "latent-capacity"
    num_views: ClassVar[int] = 1

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(backbone)
        decoders.need_patches(backbone, 4, method="vqvae")
        backbone.freeze_head()
        self.commitment = config.commitment
        self.encoder = nn.Linear(backbone.token_features, config.features)
        self.book = Book(config)
        self.decoder = decoders.PatchDecoder(
            config.features,
            channels=backbone.channels,
            patch_size=backbone.image_size // backbone.grid,
            width=config.decoder_width,
        )
        self._encodings: Tensor | None = None

    def _encode(self, x: Images) -> Float[Tensor, "batch patches features"]:
        return heads.full_precision(self.encoder(self.backbone.patches(x)))

    def _codes(self, z: Float[Tensor, "batch patches features"]) -> Float[Tensor, "batch patches features"]:
        return self.book.vectors[self.book.nearest(z.detach().flatten(0, 1))].view_as(z)

    def _decode(self, codes: Float[Tensor, "batch patches features"]) -> Images:
        grid = self.backbone.grid
        return heads.full_precision(self.decoder(codes.transpose(1, 2).unflatten(2, (grid, grid))))

    def energy(self, x: Images, y: Images) -> Float[Tensor, " batch"]:
        predicted = self._decode(self._codes(self._encode(x)))
        return (predicted - self.backbone.normalise(y)).square().flatten(1).mean(1)

    def loss(self, views: Sequence[Images], samples: Samples) -> Terms:
        (x,) = views
        z = self._encode(x)
        codes = self._codes(z)
        straight_through = z + (codes - z).detach()
        reconstruction = F.mse_loss(self._decode(straight_through), self.backbone.normalise(x))
        commitment = F.mse_loss(z, codes)
        self._encodings = z.detach().flatten(0, 1)
        return total(
            reconstruction + self.commitment * commitment, reconstruction=reconstruction, commitment=commitment
        )

    def after_step(self, progress: float) -> None:
        if self._encodings is not None:
            self.book.follow(self._encodings)
            self._encodings = None


def build(config: Config, backbone: Backbone, num_samples: int) -> VQVAE:
    return VQVAE(config, backbone)
