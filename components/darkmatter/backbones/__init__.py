"""Networks that turn an image into a vector. One file a family, chosen by `backbone.name`.

A backbone module defines `Config` and `build(config, *, channels, image_size) -> nn.Module`, a network that maps
normalised images (B, C, S, S) to features (B, D) in two steps, as timm's do: `forward_features` to a map (B, T, h, w) or
tokens (B, prefix + N, T), `forward_head` from there to (B, D). It has the attribute `num_features` (D), and for
`pretrain.layer_decay` a method `group_matcher`, as timm's have.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from darkmatter.params import ParamsError

Images = Float[Tensor, "batch channels size size"]


class Backbone(nn.Module):
    """A network with its normalisation: takes pixels in [0, 1], so that nobody downstream can forget the statistics.

    It sees an image as a grid of patches, those of a vision transformer or the places of a convolutional feature map.
    """

    def __init__(self, network: nn.Module, *, mean: Sequence[float], std: Sequence[float], image_size: int) -> None:
        super().__init__()
        self.network = network
        self.num_features = int(network.num_features)  # type: ignore[arg-type]
        self.channels, self.image_size = len(mean), image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.empty(len(mean), 1, 1))
        self.register_buffer("std", torch.empty(len(std), 1, 1))
        self.set_statistics(mean, std)
        # timm's plain vision transformers can leave hidden patches out instead of computing them.
        self.drops_patches = any(base.__name__ == "VisionTransformer" for base in type(network).__mro__)
        with torch.no_grad():
            _, patches, self.token_features = self.probe(image_size).shape
        self.grid = round(patches**0.5)
        """Patches along each side."""

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Of the training images, a number a channel: what the network sees has mean 0 and deviation 1."""
        self.mean.copy_(torch.tensor(mean).view(-1, 1, 1))
        self.std.copy_(torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Images) -> Float[Tensor, "batch features"]:
        return self.network(self.normalise(images))

    def normalise(self, images: Images) -> Images:
        """Pixels in [0, 1] to mean 0 and standard deviation 1 over the training split."""
        return (images - self.mean) / self.std

    def both(self, images: Images) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch patches tokens"]]:
        """The features, as `forward` gives them, and those of each patch, in raster order."""
        maps = self._maps(images)
        return self.network.forward_head(maps), self._tokens(maps)  # type: ignore[operator]

    def patches(
        self, images: Images, visible: Int64[Tensor, "batch visible"] | None = None
    ) -> Float[Tensor, "batch patches tokens"]:
        """Features of the visible patches (of all, without `visible`), in that order, computed from them alone.

        A vision transformer never computes the others; any other network sees the mean colour in their place.
        """
        if visible is None:
            return self._tokens(self._maps(images))
        if self.drops_patches:
            return self._visible_tokens(images, visible)
        return pick(self._tokens(self._maps(self.keep(images, visible))), visible)

    def freeze_head(self) -> None:
        """For a method that trains on patches alone: what only `forward_head` uses (a norm, mostly) stays as it began.

        DistributedDataParallel refuses parameters that no gradient reaches.
        """
        parameters = list(self.network.parameters())
        tokens = self.probe(self.image_size)
        gradients = torch.autograd.grad(tokens.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def keep(self, images: Images, visible: Int64[Tensor, "batch visible"]) -> Images:
        """The images with the mean colour everywhere but at these patches."""
        hidden = torch.ones(len(images), self.grid**2, dtype=torch.bool, device=images.device)
        return self.hide(images, hidden.scatter(1, visible, False))

    def hide(self, images: Images, hidden: Bool[Tensor, "batch patches"]) -> Images:
        """The images with the mean colour where a patch is hidden: zero after normalisation."""
        mask = hidden.view(-1, 1, self.grid, self.grid).to(images.dtype)
        mask = F.interpolate(mask, images.shape[-1], mode="nearest")
        return images * (1 - mask) + self.mean * mask

    def _maps(self, images: Images) -> Tensor:
        return self.network.forward_features(self.normalise(images))  # type: ignore[operator]

    def _tokens(self, maps: Tensor) -> Float[Tensor, "batch patches tokens"]:
        if maps.dim() == 3:
            return maps[:, getattr(self.network, "num_prefix_tokens", 0) :]
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return maps.flatten(1, 2)
        return maps.flatten(2).transpose(1, 2)

    def _visible_tokens(self, images: Images, visible: Tensor) -> Tensor:
        network, prefix = self.network, self.network.num_prefix_tokens
        x = network._pos_embed(network.patch_embed(self.normalise(images)))  # type: ignore[operator]
        x = torch.cat([x[:, :prefix], pick(x[:, prefix:], visible)], dim=1)  # type: ignore[misc]
        x = network.norm(network.blocks(network.norm_pre(x)))  # type: ignore[operator]
        return x[:, prefix:]  # type: ignore[misc]

    def probe(self, size: int) -> Float[Tensor, "1 patches tokens"]:
        """The patches of one blank image of so many pixels a side.

        Raises:
            ParamsError: the network takes no images of that size.
        """
        training = self.network.training
        self.network.eval()
        try:
            return self.patches(torch.zeros(1, self.channels, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ParamsError(
                f"the backbone takes no images of {size} pixels ({error}); change augment.image_size, or local_scale of "
                "augment.views where small views are meant"
            ) from error
        finally:
            self.network.train(training)


def pick(
    tokens: Float[Tensor, "batch patches tokens"], places: Int64[Tensor, "batch places"]
) -> Float[Tensor, "batch places tokens"]:
    """The tokens at these places of each image, in that order."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
