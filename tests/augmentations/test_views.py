"""What must hold for every policy, found by itself, and what each one promises."""

import numpy as np
import pytest
import torch
from PIL import Image

from darkmatter import images, plugin, training_set
from darkmatter.augmentations import Prepared, Views, _geometry, collate, glyphs

POLICIES = [
    pytest.param(name, options, id="-".join([name, *options.values()]))
    for name in plugin.names("augmentations")
    for options in ([{"engine": one} for one in ("exact", "fast", "device")] if name == "natural" else [{}])
]
every_policy = pytest.mark.parametrize(("name", "options"), POLICIES)

SAMPLES = np.arange(100, 112)


def build(name: str, size: int = 24, **options: object) -> Views:
    sizes = training_set.ImageSpec(image_size=size, channels=3, max_side=64, mean=[0.0], std=[1.0])
    return training_set.choose_views({"name": name, name: options}, sizes)


def contents(channels: int = 3, side: int = 32) -> list[bytes]:
    random = np.random.default_rng(0)
    made = []
    for index in range(len(SAMPLES)):
        shape = (side, 8 + index * 2, 3) if index % 2 else (8 + index * 2, side, 3)
        smooth = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(shape[1::-1])
        made.append(images.encode(np.array(smooth), max_side=side, channels=channels, encoding="png"))
    return made


def stored(pixels: np.ndarray) -> bytes:
    """(height, width) or with 3 channels."""
    rgb = np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels
    return images.encode(rgb, max_side=999, channels=1 if pixels.ndim == 2 else 3, encoding="png")


@pytest.mark.parametrize("channels", [1, 3])
@every_policy
def test_views_are_pixels_of_the_asked_size(name: str, options: dict[str, str], channels: int) -> None:
    views = build(name, **options)(contents(channels), SAMPLES, seed=0, epoch=0)
    assert len(views) == 2
    for view in views:
        assert view.shape == (12, channels, 24, 24)
        assert view.dtype == torch.float32
        assert view.min() >= 0 and view.max() <= 1
        assert torch.isfinite(view).all()


@every_policy
def test_a_view_does_not_depend_on_the_batch_it_is_made_in(name: str, options: dict[str, str]) -> None:
    policy, whole, chosen = build(name, **options), contents(), [7, 2, 11]
    few = policy([whole[index] for index in chosen], SAMPLES[chosen], seed=3, epoch=5)
    for alone, together in zip(few, policy(whole, SAMPLES, seed=3, epoch=5), strict=True):
        torch.testing.assert_close(alone, together[chosen], rtol=0, atol=1e-6)


@every_policy
def test_views_differ_by_number_epoch_and_seed_and_repeat_exactly(name: str, options: dict[str, str]) -> None:
    policy, whole = build(name, **options), contents()
    first, second = policy(whole, SAMPLES, seed=0, epoch=0)[:2]
    assert torch.equal(policy(whole, SAMPLES, seed=0, epoch=0)[0], first)
    for other in (
        second,
        policy(whole, SAMPLES, seed=1, epoch=0)[0],
        policy(whole, SAMPLES, seed=0, epoch=1)[0],
    ):
        assert ((other - first).abs().amax((1, 2, 3)) > 0.01).all()


@every_policy
def test_local_views_follow_the_whole_ones_and_change_none_of_them(name: str, options: dict[str, str]) -> None:
    policy, whole = build(name, **options, local_views=3, local_scale=0.5), contents()
    assert policy.num_local_views == 3
    views = policy(whole, SAMPLES, seed=0, epoch=0)
    assert [view.shape[-1] for view in views] == [24, 24, 12, 12, 12]
    assert all(view.min() >= 0 and view.max() <= 1 for view in views)
    plain = build(name, **options)(whole, SAMPLES, seed=0, epoch=0)
    assert all(torch.equal(a, b) for a, b in zip(views, plain, strict=False))
    assert not torch.equal(views[2], views[3])
    one = policy(whole, SAMPLES, seed=0, epoch=0, whole=1)
    assert len(one) == 4
    assert all(torch.equal(a, b) for a, b in zip(one[1:], views[2:], strict=True))


@every_policy
def test_local_views_show_less_of_the_image(name: str, options: dict[str, str]) -> None:
    """On a horizontal ramp of brightness the range of a view is the width of its cut."""
    ramp = stored(np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0))
    plain = {
        "glyphs": {"min_contrast": 1.0, "bend": 0.0, "max_shear": 0.0, "max_degrees": 0.0, "min_area": 0.9},
        "natural": {"blur_probability": [0.0] * 3, "jitter_probability": 0.0, "min_area": 0.9},
    }[name]
    policy = build(name, **options, **plain, local_views=1, local_min_area=0.1)
    first, _, local = policy([ramp] * 40, np.arange(40), seed=0, epoch=0)

    def width(view: torch.Tensor) -> torch.Tensor:
        return view.amax((1, 2, 3)) - view.amin((1, 2, 3))

    assert width(local).mean() < 0.8 * width(first).mean()
    assert width(local).min() > 0.1


@every_policy
def test_two_samples_with_equal_pixels_get_different_views(name: str, options: dict[str, str]) -> None:
    first, _ = build(name, **options)(contents()[:1] * 2, np.arange(2), seed=0, epoch=0)
    assert not torch.equal(first[0], first[1])


def full(side: int = 32) -> Prepared:
    """A batch whose canvases are wholly filled."""
    random = np.random.default_rng(1)
    squares = [stored(random.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in SAMPLES]
    return collate(squares, SAMPLES, side=side)


@pytest.mark.parametrize("size", [32, 16])
def test_warp_by_the_identity_is_resizing(size: int) -> None:
    """Same size: every pixel. Half the size: the mean of each 2x2 block."""
    batch = full()
    zero, one = torch.zeros(12), torch.ones(12)
    warped = _geometry.warp(batch, _geometry.affine(centre=(zero, zero), extent=(one, one)), size)
    expected = batch.pixels[0].float() / 255
    if size == 16:
        expected = torch.nn.functional.avg_pool2d(expected, 2)
    torch.testing.assert_close(warped, expected, rtol=0, atol=2e-5)


def test_warp_mirrors_and_cuts() -> None:
    batch = collate(contents(side=32), SAMPLES, side=32)
    batch = Prepared(pixels=batch.pixels, sizes=torch.full((12, 2), 32), samples=batch.samples)
    one, half = torch.ones(12), torch.full((12,), 0.5)
    left_half_mirrored = _geometry.affine(centre=(-half, torch.zeros(12)), extent=(-half, one))
    warped = _geometry.warp(batch, left_half_mirrored, 32)
    # The left 16 columns, mirrored, are spread over 32: output columns 2k and 2k + 1 straddle source column 15 - k.
    pairs = warped.unflatten(3, (16, 2)).mean(4)
    expected = batch.pixels[0][..., :16].flip(3).float() / 255
    torch.testing.assert_close(pairs[..., 1:-1], expected[..., 1:-1], rtol=0, atol=0.2)


@every_policy
def test_views_never_show_what_is_beyond_the_image(name: str, options: dict[str, str]) -> None:
    """What surrounds an image is zero; a white image must stay white wherever it is cut."""
    white = stored(np.full((9, 20), 255, np.uint8))
    plain = {"glyphs": {"min_contrast": 1.0}, "natural": {"jitter_probability": 0.0}}[name]
    for view in build(name, **options, **plain)([white] * 8, np.arange(8), seed=0, epoch=0):
        assert view.min() > 0.999


def test_glyphs_rotation_is_bounded_and_happens() -> None:
    config = glyphs.Config(min_area=1.0, max_shift=0.0, max_degrees=30.0, max_shear=0.0, bend=0.0, min_contrast=1.0)
    canvas = np.zeros((33, 33), np.uint8)
    canvas[15:18] = 255
    view, _ = glyphs.Glyphs(config, 33, 33)([stored(canvas)] * 200, np.arange(200), seed=0, epoch=0)
    ys = torch.arange(33).view(1, 33) - 16.0
    height = lambda column: (view[:, 0, :, column] * ys).sum(1) / view[:, 0, :, column].sum(1)  # noqa: E731
    angles = torch.atan2(height(28) - height(4), torch.tensor(24.0)).rad2deg()
    assert angles.abs().max() < 31
    assert angles.min() < -25
    assert angles.max() > 25
