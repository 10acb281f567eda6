"""Images: hostile bytes -> one clean array or a named reason why not; clean arrays -> bytes that are cheap to decode.

What decoding does to a file, always the same: the first frame of an animation; EXIF orientation applied; palette and
CMYK to RGB; transparency over white; 16-bit and float grey scaled to 8 bits, not cut off.
"""

import dataclasses
import io
import warnings
from typing import Literal

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

#: Decoders a hostile file may reach. Pillow's others are slower, rarer and more often attacked (measured: 0.2 s and
#: 203 MiB at worst over nearly two thousand hostile files with these, 3.3 s and 654 MiB with all).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

Pixels = UInt8[np.ndarray, "height width 3"]


class Rejected(Exception):
    """The bytes are not usable as an image. `reason` is one of a few fixed words, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ingest wants to know of an image."""

    extension: str
    """Of the format that it has, whatever its name says."""
    fingerprint: int | None
    """64 bits, signed, that are alike for images that look alike; None for one that shows nothing."""


def inspect(content: bytes, *, max_pixels: int) -> Inspection:
    """Decodes once to see whether it can be done. Raises Rejected as `decode`."""
    pixels = decode(content, max_pixels=max_pixels)
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        extension = str(image.format).lower().replace("jpeg", "jpg")
    return Inspection(extension=extension, fingerprint=fingerprint(pixels))


def fingerprint(pixels: Pixels) -> int | None:
    """The perceptual hash of C. Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), 3.2.1:
    the signs, about their median, of the 8 x 8 lowest frequencies of the 32 x 32 image, without the constant ones."""
    small = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64)
    if grey.std() < 2:
        return None
    frequencies = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = np.packbits(frequencies > np.median(frequencies))
    return int.from_bytes(bits.tobytes(), signed=True)


_COSINES = np.cos(np.pi * np.outer(np.arange(1, 9), 2 * np.arange(32) + 1) / 64)  # DCT-II, rows 1 to 8


def load_decoders() -> None:
    """Imports what Pillow would import at the first image."""
    Image.preinit()
    Image.init()


def decode(content: bytes, *, max_pixels: int | None = None) -> Pixels:
    """Any of the supported formats to RGB.

    Args:
        content: the bytes of a file.
        max_pixels: larger images are rejected before they are decoded; None for bytes that ingest has let through.

    Raises:
        Rejected: `empty`, `not-an-image`, `too-many-pixels`, `too-much-memory` or `damaged`.
    """
    if not content:
        raise Rejected("empty", "the file has no bytes")
    # Pillow warns of odd metadata and of large images; the size limit is ours and a warning is no reason.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        # The one boundary between the world's bytes and us: Pillow's parsers raise at least seven types on bad input.
        except Exception as error:
            if isinstance(error, Image.DecompressionBombError):
                raise Rejected("too-many-pixels", str(error)) from error
            raise Rejected("not-an-image", f"not one of {', '.join(_FORMATS)} ({_type(content)})") from error
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise Rejected("too-many-pixels", f"{image.width}x{image.height} is over the limit of {max_pixels} pixels")
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except MemoryError as error:
            raise Rejected("too-much-memory", f"{image.format} of {image.width}x{image.height} pixels") from error
        except Exception as error:
            raise Rejected("damaged", f"{image.format}: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # Integers are 16-bit in all six formats; floats have no fixed range, so theirs is taken from the image.
        low, high = (0.0, 65535.0) if image.mode != "F" else (float(values.min()), float(values.max()))
        grey = np.clip((values - low) / max(high - low, 1e-12) * 255 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _type(content: bytes) -> str:
    head = content[:256].lstrip().lower()
    if head.startswith((b"<?xml", b"<svg", b"<!doctype svg")):
        return "looks like SVG or XML"
    for magic, name in ((b"oggs", "Ogg"), (b"riff", "RIFF"), (b"%pdf", "PDF"), (b"pk", "ZIP"), (b"\x1f\x8b", "gzip")):
        if head.startswith(magic):
            return f"looks like {name}"
    return "looks like text" if content[:256].isascii() else "unknown type"


def encode(pixels: Pixels, *, max_side: int, channels: int, encoding: Literal["png", "jpeg"]) -> bytes:
    """Shrinks the long side to `max_side` (never enlarges) and encodes so that decoding is cheap.

    png: lossless, for small images. jpeg: quality 90, baseline, 4:2:0 (progressive decodes 2.4 times slower, measured).
    """
    image = Image.fromarray(pixels)
    scale = max_side / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    image = image.convert("L" if channels == 1 else "RGB")
    file = io.BytesIO()
    if encoding == "png":
        image.save(file, format="PNG", compress_level=1)
    else:
        image.save(file, format="JPEG", quality=90, progressive=False, subsampling="4:2:0" if channels == 3 else -1)
    return file.getvalue()


def decode_own(content: bytes) -> UInt8[np.ndarray, "height width channels"]:
    """Decodes what `encode` wrote. No defences: the bytes are ours and the shard's sha256 was checked.

    JPEG by simplejpeg, bit for bit what Pillow gives and in half the time (measured).
    """
    if content.startswith(b"\xff\xd8"):
        space = simplejpeg.decode_jpeg_header(content)[2]
        return simplejpeg.decode_jpeg(content, colorspace="GRAY" if space == "Gray" else "RGB")
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.atleast_3d(np.array(image))


def fit(pixels: Pixels, *, size: int, channels: int) -> UInt8[np.ndarray, "channels size size"]:
    """What a network sees at inference: the short side resized to `size`, the centre cut out."""
    image = ImageOps.fit(Image.fromarray(pixels), (size, size), method=Image.Resampling.BICUBIC)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return np.ascontiguousarray(np.atleast_3d(array).transpose(2, 0, 1))
