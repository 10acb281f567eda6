"""What must hold for every policy, found by itself, and what each one promises."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from darkmatter import images, plugin, training_set
from darkmatter.augmentations import Draws, ImageBatch, Views, _geometry, collate, glyphs, natural

POLICIES = plugin.names("augmentations")


def build(name: str, size: int = 24, **options: object) -> Views:
    return training_set.choose_views({"name": name, name: options}, size)


def batch(channels: int = 3, side: int = 32, count: int = 12) -> ImageBatch:
    random = np.random.default_rng(0)
    contents = []
    for index in range(count):
        shape = (side, 8 + index * 2, 3) if index % 2 else (8 + index * 2, side, 3)
        smooth = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(shape[1::-1])
        contents.append(images.encode(np.array(smooth), max_side=side, channels=channels, encoding="png"))
    return collate(contents, np.arange(100, 100 + count), side=side)


def rows(whole: ImageBatch, chosen: torch.Tensor) -> ImageBatch:
    return ImageBatch(**{name: value[chosen] for name, value in vars(whole).items()})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_views_are_pixels_of_the_asked_size(name: str, channels: int) -> None:
    policy = build(name)
    views = policy(batch(channels), seed=0, epoch=0)
    assert len(views) == 2
    for view in views:
        assert view.shape == (12, channels, 24, 24)
        assert view.dtype == torch.float32
        assert view.min() >= 0 and view.max() <= 1
        assert torch.isfinite(view).all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_view_does_not_depend_on_the_batch_it_is_made_in(name: str) -> None:
    policy, whole = build(name), batch()
    chosen = torch.tensor([7, 2, 11])
    for alone, together in zip(
        policy(rows(whole, chosen), seed=3, epoch=5), policy(whole, seed=3, epoch=5), strict=True
    ):
        torch.testing.assert_close(alone, together[chosen], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_views_differ_by_number_epoch_and_seed_and_repeat_exactly(name: str) -> None:
    policy, whole = build(name), batch()
    first, second = policy(whole, seed=0, epoch=0)[:2]
    assert torch.equal(policy(whole, seed=0, epoch=0)[0], first)
    for other in (second, policy(whole, seed=1, epoch=0)[0], policy(whole, seed=0, epoch=1)[0]):
        assert ((other - first).abs().amax((1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("name", POLICIES)
def test_local_views_follow_the_whole_ones_and_change_none_of_them(name: str) -> None:
    policy, whole = build(name, local_views=3, local_scale=0.5), batch()
    assert policy.num_local_views == 3
    views = policy(whole, seed=0, epoch=0)
    assert [view.shape[-1] for view in views] == [24, 24, 12, 12, 12]
    assert all(view.min() >= 0 and view.max() <= 1 for view in views)
    assert all(torch.equal(a, b) for a, b in zip(views, build(name)(whole, seed=0, epoch=0), strict=False))
    assert not torch.equal(views[2], views[3])
    one = policy(whole, seed=0, epoch=0, whole=1)
    assert len(one) == 4
    assert all(torch.equal(a, b) for a, b in zip(one[1:], views[2:], strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_local_views_show_less_of_the_image(name: str) -> None:
    """On a horizontal ramp of brightness the range of a view is the width of its cut."""
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(40, 1, 64, 64)
    images_ = ImageBatch(pixels=ramp, sizes=torch.full((40, 2), 64), samples=torch.arange(40))
    plain = {
        "glyphs": {"min_contrast": 1.0, "bend": 0.0, "max_shear": 0.0, "max_degrees": 0.0, "min_area": 0.9},
        "natural": {"blur_probability": 0.0, "min_area": 0.9},
    }[name]
    options = {**plain, "local_views": 1, "local_min_area": 0.1}
    first, _, local = build(name, **options)(images_, seed=0, epoch=0)

    def width(view: torch.Tensor) -> torch.Tensor:
        return view.amax((1, 2, 3)) - view.amin((1, 2, 3))

    assert width(local).mean() < 0.8 * width(first).mean()
    assert width(local).min() > 0.1


@pytest.mark.parametrize("name", POLICIES)
def test_two_samples_with_equal_pixels_get_different_views(name: str) -> None:
    whole = batch()
    twice = ImageBatch(
        pixels=whole.pixels[:1].expand(2, -1, -1, -1), sizes=whole.sizes[:1].expand(2, -1), samples=torch.tensor([0, 1])
    )
    first, _ = build(name)(twice, seed=0, epoch=0)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("size", [32, 16])
def test_warp_by_the_identity_is_resizing(size: int) -> None:
    """Same size: every pixel. Half the size: the mean of each 2x2 block."""
    whole = batch(side=32)
    full = ImageBatch(pixels=whole.pixels, sizes=torch.full((12, 2), 32), samples=whole.samples)
    zero, one = torch.zeros(12), torch.ones(12)
    warped = _geometry.warp(full, _geometry.affine(centre=(zero, zero), extent=(one, one)), size)
    expected = full.pixels.float() / 255
    if size == 16:
        expected = torch.nn.functional.avg_pool2d(expected, 2)
    torch.testing.assert_close(warped, expected, rtol=0, atol=2e-5)


def test_warp_mirrors_and_cuts() -> None:
    whole = batch(side=32)
    full = ImageBatch(pixels=whole.pixels, sizes=torch.full((12, 2), 32), samples=whole.samples)
    one, half = torch.ones(12), torch.full((12,), 0.5)
    left_half_mirrored = _geometry.affine(centre=(-half, torch.zeros(12)), extent=(-half, one))
    warped = _geometry.warp(full, left_half_mirrored, 32)
    # The left 16 columns, mirrored, are spread over 32: output columns 2k and 2k + 1 straddle source column 15 - k.
    pairs = warped.unflatten(3, (16, 2)).mean(4)
    torch.testing.assert_close(
        pairs[..., 1:-1], (full.pixels[..., :16].flip(3).float() / 255)[..., 1:-1], rtol=0, atol=0.2
    )


def test_warp_never_reads_beyond_the_image() -> None:
    """The canvas around an image is zero; a white image must stay white wherever it is cut."""
    canvas = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    canvas[:, :, :9, :20] = 255
    white = ImageBatch(pixels=canvas, sizes=torch.tensor([[9, 20]]).expand(8, 2), samples=torch.arange(8))
    for policy in (glyphs.Glyphs(glyphs.Config(min_contrast=1.0), 24),):
        for view in policy(white, seed=0, epoch=0):
            assert view.min() > 0.999


def test_glyphs_rotation_is_bounded_and_happens() -> None:
    config = glyphs.Config(min_area=1.0, max_shift=0.0, max_degrees=30.0, max_shear=0.0, bend=0.0, min_contrast=1.0)
    canvas = torch.zeros(200, 1, 33, 33, dtype=torch.uint8)
    canvas[:, :, 15:18, :] = 255
    line = ImageBatch(pixels=canvas, sizes=torch.full((200, 2), 33), samples=torch.arange(200))
    view, _ = glyphs.Glyphs(config, 33)(line, seed=0, epoch=0)
    ys = torch.arange(33).view(1, 33) - 16.0
    height = lambda column: (view[:, 0, :, column] * ys).sum(1) / view[:, 0, :, column].sum(1)  # noqa: E731
    angles = torch.atan2(height(28) - height(4), torch.tensor(24.0)).rad2deg()
    assert angles.abs().max() < 31
    assert angles.min() < -25
    assert angles.max() > 25


def test_natural_crops_cover_the_asked_areas() -> None:
    policy = natural.Natural(natural.Config(min_area=0.25), 24)
    count = 4000
    many = ImageBatch(
        pixels=torch.zeros(count, 1, 2, 2, dtype=torch.uint8),
        sizes=torch.full((count, 2), 100),
        samples=torch.arange(count),
    )
    matrix = policy._crop(many, Draws.of(seed=0, epoch=0, samples=many.samples, view=0), local=False)
    wide, high = matrix[:, 0, 0].abs(), matrix[:, 1, 1]
    area, aspect = wide * high, wide / high
    assert 0.24 < area.min() < 0.27
    assert area.max() <= 1
    inside = (wide < 0.999) & (high < 0.999)
    assert aspect[inside].min() > 0.74 and aspect[inside].max() < 1.34
    assert (matrix[:, 0, 2].abs() + wide <= 1 + 1e-5).all()
    assert (matrix[:, 1, 2].abs() + high <= 1 + 1e-5).all()
    assert abs((matrix[:, 0, 0] < 0).float().mean() - 0.5) < 0.03


def test_natural_without_colour_or_blur_only_crops() -> None:
    config = {"jitter": 0.0, "grey_probability": 0.0, "blur_probability": 0.0}
    policy = build("natural", **config)
    whole = batch()
    draws = Draws.of(seed=0, epoch=0, samples=whole.samples, view=0)
    expected = _geometry.warp(whole, policy._crop(whole, draws, local=False), 24)
    torch.testing.assert_close(policy(whole, seed=0, epoch=0)[0], expected, rtol=0, atol=1e-5)


def test_natural_grey_is_grey_and_blur_smooths() -> None:
    grey = build("natural", grey_probability=1.0, blur_probability=0.0)(batch(), seed=0, epoch=0)[0]
    assert grey.std(1).max() < 1e-5
    sharp = build("natural", size=112, jitter=0.0, blur_probability=0.0)(batch(), seed=0, epoch=0)[0]
    soft = build("natural", size=112, jitter=0.0, blur_probability=1.0)(batch(), seed=0, epoch=0)[0]
    roughness = lambda view: (view[..., 1:] - view[..., :-1]).square().mean()  # noqa: E731
    assert roughness(soft) < roughness(sharp)
    assert math.isclose(float(soft.mean()), float(sharp.mean()), abs_tol=5e-3)
