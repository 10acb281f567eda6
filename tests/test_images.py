"""Files are written with Pillow here and then damaged: each has a defined outcome."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darkmatter import images

GRADIENT = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def rejected(content: bytes, **options: int) -> str:
    with pytest.raises(images.Rejected) as caught:
        images.decode(content, **options)
    return caught.value.reason


def test_grey_and_colour_come_out_as_rgb() -> None:
    grey = images.decode(encoded(Image.fromarray(GRADIENT), "PNG"))
    assert grey.shape == (6, 8, 3)
    assert (grey == GRADIENT[:, :, None]).all()


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    values = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    decoded = images.decode(encoded(Image.fromarray(values), "PNG"))[:, :, 0]
    assert np.abs(decoded.astype(float) - values / 257).max() <= 0.51


def test_float_images_use_their_own_range() -> None:
    values = np.linspace(-3.0, 7.0, 48, dtype=np.float32).reshape(6, 8)
    decoded = images.decode(encoded(Image.fromarray(values), "TIFF"))[:, :, 0]
    assert (decoded[0, 0], decoded[-1, -1]) == (0, 255)


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    decoded = images.decode(encoded(image, "PNG"))
    assert decoded[0, 0].tolist() == [200, 0, 0]
    assert decoded[1, 1].tolist() == [255, 255, 255]


def test_transparent_palette_lies_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = images.decode(encoded(image, "PNG", transparency=0))
    assert decoded[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.dstack([np.repeat([[0], [255]], 8, 1).repeat(8, 0)] * 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    decoded = images.decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert decoded.shape == (8, 16, 3)
    assert decoded[:, :6].mean() > 200 > 60 > decoded[:, -6:].mean()


def test_cmyk_is_converted_and_animation_gives_its_first_frame() -> None:
    assert images.decode(encoded(Image.new("CMYK", (4, 4)), "JPEG")).shape == (4, 4, 3)
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    decoded = images.decode(encoded(first, "GIF", save_all=True, append_images=[second]))
    assert decoded[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"OggS\x00\x02", "Ogg"),
        (b"hello", "text"),
        (b"\x00\x01\x02\xff", "unknown"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, says: str) -> None:
    with pytest.raises(images.Rejected, match=says) as caught:
        images.decode(content)
    assert caught.value.reason == "not-an-image"


def test_empty_truncated_and_huge_are_rejected_by_name() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP"):
        content = encoded(Image.fromarray(noise), kind)
        assert rejected(content[: len(content) // 2]) in ("damaged", "not-an-image"), kind
    assert rejected(b"") == "empty"
    bomb = encoded(Image.new("1", (5000, 5000)), "PNG")
    assert rejected(bomb, max_pixels=24_999_999) == "too-many-pixels"
    assert images.decode(bomb, max_pixels=25_000_000).shape == (5000, 5000, 3)


def test_formats_off_the_list_are_not_opened() -> None:
    assert rejected(encoded(Image.new("RGB", (4, 4)), "PPM")) == "not-an-image"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_a_mutated_file_is_decoded_or_rejected(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(Image.fromarray(GRADIENT), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = images.decode(bytes(content), max_pixels=1_000_000)
    except images.Rejected as outcome:
        assert outcome.reason in ("damaged", "not-an-image", "too-many-pixels")
    else:
        assert decoded.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_png_training_images_keep_every_bit(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    if channels == 1:
        pixels[:] = pixels[:, :, :1]
    stored = images.encode(pixels, max_side=30, channels=channels, encoding="png")
    assert (images.decode_own(stored) == pixels[:, :, :channels]).all()


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_training_images_are_bounded_and_keep_their_aspect(encoding: str) -> None:
    pixels = np.zeros((300, 100, 3), np.uint8)
    stored = images.encode(pixels, max_side=60, channels=3, encoding=encoding)
    assert images.decode_own(stored).shape == (60, 20, 3)
    assert images.decode_own(images.encode(pixels, max_side=999, channels=3, encoding=encoding)).shape == (300, 100, 3)


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)])
def test_fit_cuts_the_centre(shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[-10 - (shape[0] - 10) // 2 :, -10 - (shape[1] - 10) // 2 :][:10, :10] = 255
    assert images.fit(pixels, size=10, channels=1).min() == 255
    assert images.fit(pixels, size=5, channels=3).shape == (3, 5, 5)
