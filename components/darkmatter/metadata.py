"""What a picture file says beside its picture (where it was taken and with what, captions, thumbnails, anything behind its
end) taken out, without touching a pixel.

JPEG, PNG and WebP keep their compressed data, byte for byte. Other formats, and files that are not built as they should
be, are encoded anew as PNG of what `images.decode` makes of them, which is all that any stage ever sees.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from darkmatter import images

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT"}
_WEBP_KEPT = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_FLAGS = 0b0010_1100  # of VP8X: that there is a colour profile (2^5), EXIF (2^3), XMP (2^2)
#: In compressed data every FF is followed by 00, or is a marker of a restart or of what comes next.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class _Odd(Exception):
    """Not built as its format says."""


def strip(content: bytes) -> tuple[bytes, str]:
    """(the picture and nothing else, extension of its format). A picture that has nothing else comes back as it is.

    Args:
        content: what `images.inspect` let through.

    Raises:
        images.Rejected: as `images.decode`.
    """
    try:
        if content.startswith(b"\xff\xd8"):
            return b"".join(_jpeg(content)), "jpg"
        if content.startswith(_PNG):
            return b"".join(_png(content)), "png"
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _webp(content), "webp"
    except (_Odd, struct.error, IndexError):
        pass
    file = io.BytesIO()
    Image.fromarray(images.decode(content)).save(file, format="PNG")
    return file.getvalue(), "png"


def _orientation(content: bytes) -> int:
    """How the picture has to be turned, 1 where it has not: the one tag that decoding asks for."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # Pillow's parsers, as in images.py: what they cannot read turns nothing
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _exif(orientation: int) -> bytes:
    """A TIFF of one tag."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)


def _jpeg(content: bytes) -> Iterator[bytes]:
    yield content[:2]
    at, orientation = 2, _orientation(content)
    while True:
        if content[at] != 0xFF:
            raise _Odd
        while content[at + 1] == 0xFF:  # filling
            at += 1
        marker = content[at + 1]
        if marker == 0xD9:
            yield content[at : at + 2]  # and nothing behind the end
            return
        (length,) = struct.unpack_from(">H", content, at + 2)
        segment = content[at : at + 2 + length]
        if length < 2 or len(segment) != 2 + length:
            raise _Odd
        if orientation != 1 and marker != 0xE0:
            exif = b"Exif\0\0" + _exif(orientation)
            yield struct.pack(">HH", 0xFFE1, 2 + len(exif)) + exif
            orientation = 1
        if marker == 0xE0 and segment[4:9] == b"JFIF\0" and length >= 16:
            yield struct.pack(">HH", 0xFFE0, 16) + segment[4:16] + b"\0\0"  # without its thumbnail
        elif marker == 0xEE and segment[4:9] == b"Adobe" and length >= 14:
            yield struct.pack(">HH", 0xFFEE, 14) + segment[4:16]  # it says how colours were transformed
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield segment
        at += 2 + length
        if marker == 0xDA:
            following = _MARKER.search(content, at)
            if following is None:
                raise _Odd
            yield content[at : following.start()]
            at = following.start()


def _png(content: bytes) -> Iterator[bytes]:
    yield _PNG
    at, orientation = len(_PNG), _orientation(content)
    while True:
        length, kind = struct.unpack_from(">I4s", content, at)
        chunk = content[at : at + 12 + length]
        if len(chunk) != 12 + length:
            raise _Odd
        if kind == b"IDAT" and orientation != 1:
            body = b"eXIf" + _exif(orientation)
            yield struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
            orientation = 1
        if kind in _PNG_KEPT:
            yield chunk
        if kind == b"IEND":
            return
        at += len(chunk)


def _webp(content: bytes) -> bytes:
    (size,) = struct.unpack_from("<I", content, 4)
    end, at, orientation = min(len(content), 8 + size), 12, _orientation(content)
    kept = []
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", content, at)
        body = content[at + 8 : at + 8 + length]
        if len(body) != length:
            raise _Odd
        if kind == b"VP8X":
            body = bytes([body[0] & ~_WEBP_FLAGS | (0b1000 if orientation != 1 else 0)]) + body[1:]
        if kind in _WEBP_KEPT:
            kept.append(struct.pack("<4sI", kind, length) + body + bytes(length % 2))
        at += 8 + length + length % 2
    if orientation != 1:
        exif = _exif(orientation)
        kept.append(struct.pack("<4sI", b"EXIF", len(exif)) + exif + bytes(len(exif) % 2))
    if not any(chunk[:4] in (b"VP8 ", b"VP8L", b"ANMF") for chunk in kept):
        raise _Odd
    inside = b"WEBP" + b"".join(kept)
    return struct.pack("<4sI", b"RIFF", len(inside)) + inside
