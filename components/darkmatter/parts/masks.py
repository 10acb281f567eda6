"""Which patches a network does not see. Drawn for the global batch on every rank, so that ranks do not change them."""

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from darkmatter import collectives


def random_order(batch: int, patches: int, device: torch.device) -> Int64[Tensor, "batch patches"]:
    """A random order of the patches of each image of this rank. Its head is what stays visible, its tail is hidden."""
    return collectives.draw(lambda size: torch.rand(size, patches, device=device), batch).argsort(1)


def fixed_orders(patches: int, hidden: int, device: torch.device) -> Int64[Tensor, "masks patches"]:
    """A few orders that, each hiding its last `hidden` patches, hide every patch about equally often.

    For inference: the same masks for every pair, so that energies of different pairs can be compared.
    """
    return _fixed_orders(patches, hidden).to(device)


@functools.cache  # drawn before an energy is traced: a program of it would draw, and others, at every call
@torch.inference_mode(False)
def _fixed_orders(patches: int, hidden: int) -> Tensor:
    masks = max(2, math.ceil(patches / hidden))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(patches, generator=generator)
    return torch.stack([order.roll(round(index * patches / masks)) for index in range(masks)])


def blocks(batch: int, grid: int, share: Sequence[float], device: torch.device) -> Bool[Tensor, "batch patches"]:
    """Rectangles that cover together about a share of the image, drawn for each image from `share` = (least, most).

    H. Bao et al., "BEiT" (2022), algorithm 1: aspect ratio from 0.3 to 1 / 0.3; rectangles are added, each as large as
    what is still missing allows, until the share is reached or ten have been tried. True is hidden.
    """
    patches = grid * grid

    def sample(size: int) -> Tensor:
        low, high = share
        wanted = ((low + (high - low) * torch.rand(size, device=device)) * patches).round()
        hidden = torch.zeros(size, grid, grid, dtype=torch.bool, device=device)
        places = torch.arange(grid, device=device)
        for _ in range(10):
            missing = wanted - hidden.sum((1, 2))
            draws = torch.rand(size, 4, device=device)
            area = (missing * (0.5 + 0.5 * draws[:, 0])).clamp(min=1)
            aspect = torch.exp((2 * draws[:, 1] - 1) * math.log(1 / 0.3))
            tall = (area * aspect).sqrt().round().clamp(1, grid)
            wide = (area / aspect).sqrt().round().clamp(1, grid)
            top = (draws[:, 2] * (grid - tall + 1)).floor()
            left = (draws[:, 3] * (grid - wide + 1)).floor()
            rows = (places >= top[:, None]) & (places < (top + tall)[:, None])
            columns = (places >= left[:, None]) & (places < (left + wide)[:, None])
            grown = hidden | (rows[:, :, None] & columns[:, None, :])
            fits = grown.sum((1, 2)) <= wanted
            hidden = torch.where(fits[:, None, None], grown, hidden)
        return hidden.flatten(1)

    return collectives.draw(sample, batch)


def multi_block(
    batch: int, grid: int, device: torch.device
) -> tuple[Int64[Tensor, "batch context"], Int64[Tensor, "targets batch block"]]:
    """The patches of a context and of four targets for each image of this rank, in raster order.

    M. Assran et al., "I-JEPA" (2023), section 3 and appendix A.1, as in facebookresearch/ijepa, `src/masks/multiblock.py`:
    targets are rectangles of 0.15 to 0.2 of the image, of one size for the batch; the context is a square of 0.85 to 1 of
    it without the targets, cut to the smallest of the batch. There a rectangle never touches the last row and column,
    which loses little of 16 x 16 patches and much of 7 x 7; here it may lie anywhere.
    """
    context, targets = _multi_blocks(batch * collectives.world_size(), grid, None)
    mine = slice(collectives.rank() * batch, (collectives.rank() + 1) * batch)
    return context[mine].to(device), targets[:, mine].to(device)


def fixed_multi_blocks(
    masks: int, grid: int, device: torch.device
) -> tuple[Int64[Tensor, "masks context"], Int64[Tensor, "targets masks block"]]:
    """For inference: a few contexts with targets as `multi_block` draws them, the same at every call."""
    context, targets = _fixed_multi_blocks(masks, grid)
    return context.to(device), targets.to(device)


@functools.cache  # as _fixed_orders
@torch.inference_mode(False)
def _fixed_multi_blocks(masks: int, grid: int) -> tuple[Tensor, Tensor]:
    return _multi_blocks(masks, grid, torch.Generator().manual_seed(0))


def _multi_blocks(size: int, grid: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Drawn on the CPU: how many patches a context has decides shapes, and a GPU would have to be waited for."""

    def block(share: float, aspect: float) -> tuple[int, int]:
        area = int(grid * grid * share)
        height, width = (max(1, round((area * ratio) ** 0.5)) for ratio in (aspect, 1 / aspect))
        return height, width

    def place(height: int, width: int, count: int) -> Bool[Tensor, "count size grid grid"]:
        draws = torch.rand(size, count, 2, generator=generator).transpose(0, 1)
        top = (draws[..., 0] * (grid - height + 1)).floor()[..., None, None]
        left = (draws[..., 1] * (grid - width + 1)).floor()[..., None, None]
        rows, columns = torch.arange(grid)[:, None], torch.arange(grid)
        return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)

    first, second = torch.rand(2, generator=generator).tolist()
    targets = place(*block(0.15 + 0.05 * first, 0.75 + 0.75 * first), 4).flatten(2)  # one draw for both, as there
    free = ~targets.any(0)  # (size, patches)
    free = torch.where(free.any(1, keepdim=True), free, ~targets[0])  # they let the context overlap targets then
    context = place(*block(0.85 + 0.15 * second, 1.0), 1)[0].flatten(1) & free
    too_small = context.sum(1) < max(1, grid * grid * 10 // 256)  # their least: 10 patches of 256; they draw again
    context = torch.where(too_small[:, None], free, context)
    smallest = int(context.sum(1).min())
    order = (~context).to(torch.uint8).argsort(dim=1, stable=True)  # those of the context first, in raster order
    blocks = (~targets).to(torch.uint8).argsort(dim=2, stable=True)
    return order[:, :smallest], blocks[..., : int(targets[0, 0].sum())]
