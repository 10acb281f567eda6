"""Every format: the canaries go, the picture stays as decoding gives it."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from darkmatter import images, metadata

CANARY = b"CANARY-8f3a"


def pictures(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert("RGB").convert(mode)


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x010F], made[0x013B] = orientation, CANARY.decode(), CANARY.decode()
    gps = made.get_ifd(0x8825)
    gps[1], gps[2] = CANARY.decode(), (52.0, 31.0, 12.0)
    return made


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def files() -> Iterator[tuple[str, bytes]]:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", CANARY.decode())
    text.add_itxt("XML:com.adobe.xmp", CANARY.decode(), zip=False)
    xmp = b"<x:xmpmeta>" + CANARY + b"</x:xmpmeta>"
    for turned in (1, 3, 6):
        for mode in ("RGB", "L", "CMYK"):
            options = {"exif": exif(turned), "comment": CANARY, "xmp": xmp, "icc_profile": CANARY * 9}
            for how in ({}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 1}):
                yield f"jpeg-{mode}-{turned}-{'-'.join(how)}", saved(pictures(mode), "JPEG", **options, **how) + CANARY
        for mode in ("RGB", "L", "P", "RGBA", "I;16"):
            image = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60)
            image = image if mode == "I;16" else pictures(mode)
            yield f"png-{mode}-{turned}", saved(image, "PNG", exif=exif(turned), pnginfo=text) + CANARY
        for lossless in (True, False):
            options = {"exif": exif(turned), "xmp": xmp, "icc_profile": CANARY}
            yield f"webp-{lossless}-{turned}", saved(pictures("RGBA"), "WEBP", lossless=lossless, **options) + CANARY
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = CANARY.decode()
    yield "tiff", saved(pictures("RGB"), "TIFF", tiffinfo=tags)
    yield "gif", saved(pictures("P"), "GIF", comment=CANARY) + CANARY
    yield "animation", saved(pictures("P"), "GIF", comment=CANARY, save_all=True, append_images=[pictures("P")])
    yield "bmp", saved(pictures("RGB"), "BMP") + CANARY


@pytest.mark.parametrize(("name", "content"), [pytest.param(*one, id=one[0]) for one in files()])
def test_the_canaries_go_and_the_picture_stays(name: str, content: bytes) -> None:
    assert CANARY in content
    stripped, extension = metadata.strip(content)
    assert CANARY not in stripped
    np.testing.assert_array_equal(images.decode(stripped), images.decode(content))
    assert images.inspect(stripped, max_pixels=10_000).extension == extension
    assert metadata.strip(stripped) == (stripped, extension), "once more changes nothing"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_has_nothing_to_hide_keeps_its_bytes(kind: str) -> None:
    content = saved(pictures("RGB"), kind)
    assert metadata.strip(content)[0] == content


def test_the_compressed_data_of_a_photograph_is_not_touched() -> None:
    plain = saved(pictures("RGB"), "JPEG", quality=80)
    assert metadata.strip(saved(pictures("RGB"), "JPEG", quality=80, exif=exif(1), comment=CANARY))[0] == plain


@pytest.mark.parametrize("cut", [3, 30, 200])
def test_a_file_that_is_not_built_as_it_should_is_encoded_anew_or_rejected(cut: int) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = saved(pictures("RGB"), kind)[:-cut] + CANARY
        try:
            assert CANARY not in metadata.strip(content)[0]
        except images.Rejected:
            continue
