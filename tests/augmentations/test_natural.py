"""What `natural` draws and what it does to pixels, against torchvision and Pillow."""

import io
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from darkmatter import images
from darkmatter.augmentations import Draws, _cpu, natural
from darkmatter.augmentations._colour import CONTRAST, HUE, Colours

PHOTOGRAPH = np.ascontiguousarray(load_sample_image("china.jpg")[:400, :600])
SMALL = cv2.resize(PHOTOGRAPH, (96, 96), interpolation=cv2.INTER_AREA)
VIVID = cv2.resize(np.ascontiguousarray(load_sample_image("flower.jpg")), (96, 96), interpolation=cv2.INTER_AREA)
ENGINES = ["exact", "fast", "device"]
PLAIN = {"jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": [0.0, 0.0, 0.0]}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(one.astype(float) - other.astype(float)).mean())


def views(size: int = 96, count: int = 32, photograph: np.ndarray = PHOTOGRAPH, **options: object) -> torch.Tensor:
    """The first view of one photograph, drawn `count` times."""
    channels = 1 if photograph.ndim == 2 else 3
    rgb = photograph if channels == 3 else np.dstack([photograph] * 3)
    content = images.encode(rgb, max_side=999, channels=channels, encoding="png")
    policy = natural.build(natural.Config(**options), image_size=size, max_side=999)
    return policy([content] * count, np.arange(count), seed=0, epoch=0)[0]


def changed(change: Callable[..., None], pixels: np.ndarray, *arguments: Any) -> np.ndarray:
    """What a change in place makes of a copy."""
    copy = pixels.copy()
    change(copy, *arguments)
    return copy


def resized(resize: Callable[..., None], pixels: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, size, pixels.shape[2]), np.uint8)
    resize(pixels, out)
    return out


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (64, 640), (640, 64), (7, 5)])
def test_cuts_have_torchvisions_distribution(shape: tuple[int, int]) -> None:
    """Also where an image is so long that hardly a try fits."""
    count, scale = 3000, (0.08, 1.0)
    draws = Draws.of(seed=0, epoch=0, samples=torch.arange(count), view=0)
    tries = natural._tries(draws, *(torch.full((count,), bound) for bound in scale))
    corners = draws.units(2).tolist()
    ours = np.array([natural.box(*shape, *one) for one in zip(tries, corners, strict=True)])
    torch.manual_seed(0)
    crop, blank = v2.RandomResizedCrop(8, scale=scale), torch.zeros(1, *shape)
    drawn = [crop.make_params([blank]) for _ in range(count)]
    theirs = np.array([[one[name] for name in ("top", "left", "height", "width")] for one in drawn])
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all() and (ours[:, 1] + ours[:, 3] <= shape[1]).all()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3


def test_orders_and_factors_of_the_jitter_have_torchvisions_distribution() -> None:
    draws = Draws.of(seed=0, epoch=0, samples=torch.arange(24_000), view=0)
    colours = Colours.draw(draws, [0.4, 0.3, 2.0, 0.1], jitter_probability=0.8, grey_probability=0.2)
    counts = np.unique(colours.order.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(colours.jittered.float().mean() - 0.8) < 0.01 and abs(colours.grey.float().mean() - 0.2) < 0.01
    done = colours.factors[colours.jittered].numpy()
    for column, (least, most) in enumerate([(0.6, 1.4), (0.7, 1.3), (0.0, 3.0), (-0.1, 0.1)]):
        assert stats.kstest(done[:, column], "uniform", args=(least, most - least)).pvalue > 1e-3
    assert (colours.factors[~colours.jittered] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()


def one_by_one(pixels: np.ndarray, colours: Colours, index: int) -> np.ndarray:
    """The steps as torchvision does them on Pillow's images."""
    image = Image.fromarray(pixels)
    steps = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue]
    for step in colours.order[index].tolist():
        image = steps[step](image, float(colours.factors[index, step]))
    if colours.grey[index]:
        image = reference.rgb_to_grayscale(image, num_output_channels=3)
    return np.asarray(image)


@pytest.mark.parametrize(("engine", "least", "quarter"), [("exact", 24, 38), ("fast", 15, 22), ("device", 15, 22)])
def test_colours_are_torchvisions_to_within_clamping_and_hue(engine: str, least: float, quarter: float) -> None:
    """Of each of 60 drawn jitters. `fast` and `device` turn the hue in YIQ, which is another one than HSV's."""
    whole = views(96, 60, VIVID, engine=engine, min_area=1.0, blur_probability=[0.0] * 3)
    plain = views(96, 60, VIVID, engine=engine, min_area=1.0, **PLAIN)
    draws = Draws.of(seed=0, epoch=0, samples=torch.arange(60), view=0)
    colours = Colours.draw(draws, [0.4, 0.4, 0.4, 0.1], jitter_probability=0.8, grey_probability=0.2)
    to_pixels = lambda view: (view.permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)  # noqa: E731
    found = [
        psnr(to_pixels(whole[index]) + 1e-3, one_by_one(to_pixels(plain[index]), colours, index)) for index in range(60)
    ]
    assert min(found) > least, sorted(found)[:5]
    assert np.quantile(found, 0.25) > quarter, np.quantile(found, 0.25)


def test_hue_turns_the_way_torchvisions_does() -> None:
    colours = Colours(
        order=torch.tensor([[HUE, 0, 1, 2]] * 2),
        factors=torch.tensor([[1.0, 1.0, 1.0, 0.05], [1.0, 1.0, 1.0, -0.05]]),
        jittered=torch.ones(2, dtype=torch.bool),
        grey=torch.zeros(2, dtype=torch.bool),
    )
    right, wrong = (changed(_cpu.map_colour, SMALL, maps) for maps in colours.maps().numpy())
    theirs = np.asarray(reference.adjust_hue(Image.fromarray(SMALL), 0.05))
    assert psnr(right, theirs) > psnr(wrong, theirs) + 3
    assert psnr(changed(_cpu.turn_hue, SMALL, 0.05), theirs) > 45
    assert (
        psnr(changed(_cpu.turn_hue, SMALL, -0.05), np.asarray(reference.adjust_hue(Image.fromarray(SMALL), -0.05))) > 45
    )


def test_folded_steps_are_the_steps_one_after_the_other() -> None:
    """Exactly, in float64 and without clamping: every order, each subset of places."""
    draws = Draws.of(seed=3, epoch=0, samples=torch.arange(200), view=0)
    colours = Colours.draw(draws, [0.4, 0.4, 0.4, 0.1], jitter_probability=1.0, grey_probability=0.5)
    which = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    maps = colours.maps(which).double()
    only = Colours(order=colours.order, factors=colours.factors, jittered=colours.jittered, grey=colours.grey)
    pixels = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grey = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    for index in range(200):
        x = pixels
        for place, step in enumerate(only.order[index].tolist()):
            factor = float(only.factors[index, step])
            if not which[index, place]:
                continue
            if step == CONTRAST:
                x = factor * x + (1 - factor) * (x @ grey).mean()
            elif step == HUE:
                turned = colours.maps(torch.eye(4, dtype=torch.bool)[[place] * 200], grey=False)[index, :, :3].double()
                x = x @ turned.T
            elif step == 0:
                x = factor * x
            else:
                x = factor * x + (1 - factor) * (x @ grey)[:, None]
        if only.grey[index]:
            x = (x @ grey)[:, None].expand(-1, 3)
        folded = pixels @ maps[index, :, :3].T + maps[index, :, 3:] @ pixels.mean(0)
        torch.testing.assert_close(folded, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_resizing_is_pillows_or_near_it(size: int) -> None:
    image = Image.fromarray(PHOTOGRAPH)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    assert psnr(resized(_cpu.resize_exact, PHOTOGRAPH, size), expected) > 55
    assert psnr(resized(_cpu.resize_fast, PHOTOGRAPH, size), expected) > 24
    larger = np.asarray(image.resize((700, 700), Image.Resampling.BILINEAR))
    assert psnr(resized(_cpu.resize_exact, PHOTOGRAPH, 700), larger) > 55
    assert psnr(resized(_cpu.resize_fast, PHOTOGRAPH, 700), larger) > 45


def test_a_mirrored_image_is_that_image_mirrored() -> None:
    for pixels in (SMALL, np.ascontiguousarray(SMALL[:, :95]), np.ascontiguousarray(SMALL[..., :1])):
        assert (changed(_cpu.mirror, pixels) == pixels[:, ::-1]).all()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    tensor = torch.from_numpy(SMALL).permute(2, 0, 1)
    expected = reference.gaussian_blur(tensor, [23, 23], [sigma, sigma]).permute(1, 2, 0).numpy()
    assert np.abs(changed(_cpu.blur, SMALL, sigma).astype(int) - expected).max() <= 2


def test_blur_on_the_device_is_the_same() -> None:
    tensor = torch.from_numpy(SMALL).permute(2, 0, 1)[None].expand(3, -1, -1, -1).float() / 255
    sigmas = torch.tensor([0.0, 0.7, 2.0])
    blurred = (natural._blur(tensor, sigmas, radius=6) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(blurred[0] - SMALL).max() < 1e-3
    for index in (1, 2):
        assert np.abs(blurred[index] - changed(_cpu.blur, SMALL, float(sigmas[index]))).max() < 1.5


@pytest.mark.parametrize("engine", ENGINES)
def test_solarize_is_torchvisions(engine: str) -> None:
    options = {"engine": engine, "min_area": 1.0, **PLAIN}
    plain = (views(96, 4, SMALL, **options) * 255).round().to(torch.uint8)
    inverted = views(96, 4, SMALL, **options, solarize_probability=[1.0, 0.0, 0.0])
    torch.testing.assert_close((inverted * 255).round().to(torch.uint8), reference.solarize(plain, 128))


def test_probabilities_are_those_of_the_kind_of_view() -> None:
    """First whole view, the other whole ones, the smaller ones."""
    content = images.encode(SMALL, max_side=96, channels=3, encoding="png")
    options = {**PLAIN, "min_area": 1.0, "local_views": 1, "local_min_area": 1.0, "local_scale": 1.0}
    for kind in range(3):
        chances = [float(kind == one) for one in range(3)]
        policy = natural.build(natural.Config(**options, solarize_probability=chances), image_size=96, max_side=96)
        plain = natural.build(natural.Config(**options), image_size=96, max_side=96)
        pairs = zip(*(one([content], np.arange(1), seed=0, epoch=0) for one in (policy, plain)), strict=True)
        assert [not torch.equal(a, b) for a, b in pairs] == [kind == one for one in range(3)]


def test_fast_and_device_give_the_same_views() -> None:
    options = {"solarize_probability": [0.3, 0.0, 0.0]}
    fast, device = (views(engine=engine, **options) for engine in ("fast", "device"))
    assert (fast - device).abs().mean() < 1 / 255
    assert (fast - device).abs().amax((1, 2, 3)).median() < 0.03


@pytest.mark.parametrize("engine", ENGINES)
def test_a_view_is_the_same_whatever_is_drawn_beside_it(engine: str) -> None:
    """Of other images, and other views of the same image."""
    contents = [images.encode(one, max_side=96, channels=3, encoding="png") for one in (SMALL, VIVID)]
    options = {"engine": engine, "blur_probability": [0.5] * 3, "solarize_probability": [0.5] * 3}
    policy = natural.build(natural.Config(**options, local_views=3), image_size=64, max_side=96)
    alone = natural.build(natural.Config(**options, local_views=1), image_size=64, max_side=96)
    many = policy(contents * 2, np.array([3, 8, 4, 9]), seed=0, epoch=5)
    few = alone(contents[1:], np.array([8]), seed=0, epoch=5)
    for here, there in zip(few, (many[0], many[1], many[2]), strict=True):
        torch.testing.assert_close(here[0], there[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_grey_image_gets_what_a_colour_image_without_colour_gets(engine: str) -> None:
    grey = cv2.cvtColor(SMALL, cv2.COLOR_RGB2GRAY)
    alone = views(64, 24, grey, engine=engine)
    colour = views(64, 24, np.dstack([grey] * 3), engine=engine)
    assert (alone - colour).abs().mean() < 1.5 / 255


@pytest.mark.parametrize("engine", ENGINES)
def test_grey_is_grey_and_blur_smooths(engine: str) -> None:
    off = {"engine": engine, "jitter_probability": 0.0}
    grey = views(**off, grey_probability=1.0, blur_probability=[0.0] * 3)
    assert grey.std(1).max() < 1e-5
    sharp = views(224, **off, blur_probability=[0.0] * 3)
    soft = views(224, **off, blur_probability=[1.0] * 3)
    roughness = lambda view: (view[..., 1:] - view[..., :-1]).square().mean()  # noqa: E731
    assert roughness(soft) < 0.8 * roughness(sharp)
    assert math.isclose(float(soft.mean()), float(sharp.mean()), abs_tol=5e-3)


def test_half_of_the_views_are_mirrored() -> None:
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0)
    drawn = views(32, 1000, ramp, **PLAIN)
    rising = drawn[:, 0, :, -1].mean(1) > drawn[:, 0, :, 0].mean(1)
    assert abs(rising.float().mean() - 0.5) < 0.05


def test_mean_and_spread_of_whole_views_are_those_of_the_usual_pipeline() -> None:
    """Everything together against Pillow and torchvision, each drawing for itself: mean of each channel, and roughness."""
    torch.manual_seed(0)
    usual = v2.Compose(
        [
            v2.RandomResizedCrop(64, scale=(0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.PILToTensor(),
        ]
    )
    image = Image.fromarray(PHOTOGRAPH)
    theirs = torch.stack([usual(image) for _ in range(600)]).float() / 255
    ours = views(64, 600, blur_probability=[0.0] * 3)
    for measure in (
        *(lambda view, c=c: view[:, c].mean((1, 2)) for c in range(3)),
        lambda view: view.std((1, 2, 3)),
        lambda view: view.std(1).mean((1, 2)),
        lambda view: (view[..., 1:] - view[..., :-1]).abs().mean((1, 2, 3)),
    ):
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3


def test_jpeg_is_decoded_bit_for_bit_as_pillow_does() -> None:
    for channels in (1, 3):
        content = images.encode(PHOTOGRAPH, max_side=300, channels=channels, encoding="jpeg")
        with Image.open(io.BytesIO(content)) as image:
            assert (images.decode_own(content) == np.atleast_3d(np.asarray(image))).all()


def test_what_reads_ahead_imports_neither_torchvision_nor_timm() -> None:
    """They cost a second each at the start of every process."""
    code = (
        "import sys, darkmatter.shards, darkmatter.stream, darkmatter.augmentations.natural;"
        "sys.exit(bool({'torchvision', 'timm', 'PIL.TiffImagePlugin'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
