"""From features back to patches or pixels."""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from darkmatter.backbones import Backbone, pick
from darkmatter.params import ParamsError


class PatchPredictor(nn.Module):
    """A small transformer that tells, from the features of some patches, what is at others.

    A token for each place that is asked for (one learned vector plus the position) attends to the given ones: the
    decoder of MAE (K. He et al. 2022, section 3) and the predictor of I-JEPA (M. Assran et al. 2023, appendix A.1).
    Positions are fixed sines and cosines, as in both.
    """

    def __init__(self, features: int, out: int, *, grid: int, width: int, depth: int, heads: int) -> None:
        """From tokens of `features` numbers to predictions of `out` numbers, on a grid x grid image."""
        super().__init__()
        self.enter = nn.Linear(features, width)
        self.wanted = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.wanted, std=0.02)
        self.positions: Tensor
        self.register_buffer("positions", sine_positions(grid, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, out)

    def forward(
        self,
        tokens: Float[Tensor, "batch given features"],
        given: Int64[Tensor, "batch given"],
        wanted: Int64[Tensor, "batch wanted"],
    ) -> Float[Tensor, "batch wanted out"]:
        """Predictions at the places `wanted`, from `tokens` at the places `given`."""
        x = self.enter(tokens)
        x = torch.cat([x + self.positions[given], (self.wanted + self.positions[wanted]).to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.leave(self.norm(x[:, given.shape[1] :]))


class HiddenPatches(nn.Module):
    """What is at hidden patches, predicted from the visible ones of a backbone.

    Behind a vision transformer, which never computes hidden patches, a PatchPredictor. A convolutional network computes
    something at every place, at hidden ones from its neighbours: there 3x3 convolutions read that. On the digits MAE with a
    PatchPredictor behind a convolutional network had an energy margin of 0.61 after 200 steps, with convolutions 0.96
    after 120 (DECISIONS.md).
    """

    def __init__(self, backbone: Backbone, out: int, *, width: int, depth: int, heads: int) -> None:
        """To predictions of `out` numbers a patch, through `depth` layers of `width` features."""
        super().__init__()
        self.grid, features = backbone.grid, backbone.token_features
        self.predictor: nn.Module
        if backbone.drops_patches:
            self.predictor = PatchPredictor(features, out, grid=self.grid, width=width, depth=depth, heads=heads)
        else:
            layers: list[nn.Module] = []
            for index in range(depth):
                layers += [nn.Conv2d(width if index else features, width, 3, padding=1), nn.ReLU(inplace=True)]
            self.predictor = nn.Sequential(*layers, nn.Conv2d(width, out, 1))

    def forward(
        self,
        backbone: Backbone,
        images: Float[Tensor, "batch channels size size"],
        visible: Int64[Tensor, "batch visible"],
        *hidden: Int64[Tensor, "batch _"],
    ) -> list[Float[Tensor, "batch _ out"]]:
        """Predictions at each of these sets of places, from what `backbone` makes of the patches `visible` alone.

        No prediction of one set depends on which places are in another.
        """
        if backbone.drops_patches:
            tokens = backbone.patches(images, visible)
            return [self.predictor(tokens, visible, places) for places in hidden]
        maps = backbone.patches(backbone.keep(images, visible)).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        predicted = self.predictor(maps).flatten(2).transpose(1, 2)
        return [pick(predicted, places) for places in hidden]


def sine_positions(grid: int, width: int) -> Float[Tensor, "patches width"]:
    """Half of the width says the row, half the column; frequencies as in "Attention is all you need"."""
    if width % 4:
        raise ValueError(f"a width of positions must be a multiple of 4, not {width}")
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    rows, columns = line.repeat_interleave(grid, 0), line.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


class ImageDecoder(nn.Sequential):
    """From a vector to an image: a linear layer to a small map, then nearest upsampling and 3x3 convolutions.

    (B, features) -> (B, channels, S, S), unbounded.
    """

    def __init__(self, features: int, *, channels: int, image_size: int, width: int) -> None:
        doublings = 0
        while image_size % 2 ** (doublings + 1) == 0 and image_size // 2**doublings > 8:
            doublings += 1
        start = image_size // 2**doublings
        widths = [width * 2 ** min(2, doublings - index) for index in range(doublings + 1)]
        layers: list[nn.Module] = [
            nn.Linear(features, widths[0] * start**2),
            nn.Unflatten(1, (widths[0], start, start)),
        ]
        for before, after in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True), nn.Upsample(scale_factor=2)]
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, channels, 3, padding=1)]
        super().__init__(*layers)


class PatchDecoder(nn.Sequential):
    """From a vector at each patch to an image: a 3x3 convolution over the patches, then each one to its own pixels.

    (B, features, grid, grid) -> (B, channels, S, S), unbounded.
    """

    def __init__(self, features: int, *, channels: int, patch_size: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(features, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels * patch_size**2, 1),
            nn.PixelShuffle(patch_size),
        )


def cross_entropy(
    logits: Float[Tensor, "batch channels size size"], pixels: Float[Tensor, "batch channels size size"]
) -> Float[Tensor, " batch"]:
    """What pixels in [0, 1] cost under Bernoulli probabilities, summed; nats. D. Kingma, M. Welling 2014, appendix C.1."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").flatten(1).sum(1)


def deviance(
    logits: Float[Tensor, "batch channels size size"], pixels: Float[Tensor, "batch channels size size"]
) -> Float[Tensor, " batch"]:
    """The cross-entropy minus the entropy of the pixels themselves: 0 is exact.

    No network can change that entropy, and it would make energies of different images hard to compare.
    """
    entropy = -torch.xlogy(pixels, pixels) - torch.xlogy(1 - pixels, 1 - pixels)
    return cross_entropy(logits, pixels) - entropy.flatten(1).sum(1)


def patchify(images: Float[Tensor, "batch channels size size"], grid: int) -> Float[Tensor, "batch patches pixels"]:
    """Cuts images into grid x grid patches, in raster order; all pixels and channels of a patch in one row."""
    batch, channels, size, _ = images.shape
    side = size // grid
    cut = images.view(batch, channels, grid, side, grid, side).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, grid * grid, side * side * channels)


def need_patches(backbone: Backbone, least: int, *, method: str) -> None:
    """Raises ParamsError where the backbone does not divide an image into at least `least` equal patches."""
    grid, size = backbone.grid, backbone.image_size
    if grid**2 < least or size % grid:
        raise ParamsError(
            f"objective.name: {method} works on patches, at least {least} of them; this backbone makes {grid} x {grid} of "
            f"an image of {size} pixels. A smaller patch or stride, or a larger augment.image_size, gives more"
        )
