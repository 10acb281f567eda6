"""Tars and names as nobody should make them, for tests."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def picture(number: int, *, size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    """A small image, another one for each number."""
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 151 % 256))
    image.putpixel((number % size[0], 0), (255 - number % 256, 0, 0))
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]], *, odd: list[tarfile.TarInfo] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in odd or []:
            tar.addfile(info)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
