"""`webdataset:/data/train-{000..099}.tar`, `webdataset:s3://bucket/folder` or `webdataset:https://host/part.tar`: tars
that hold a sample's files side by side, `KEY.jpg` and perhaps `KEY.cls`. Braces count, `*` looks, a folder is every
.tar below.

The label of a sample is the text of its `.cls` (or `.label`) file. A tar is read, never unpacked: names of members are
names and no paths, and what is neither file nor folder (links, devices) is rejected. Compressed tars are: nothing in
them can be found without unpacking what comes before.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator, Sequence

from darkmatter import remote
from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source, Unreadable, digest

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
_LABELS = ("cls", "label")
_LABEL_BYTES = 1024
_WINDOW = 2**22  # bytes of a tar that are fetched at once


@dataclasses.dataclass
class _Sample:
    """The members of one key, as far as they have been seen."""

    key: str
    image: tuple[str, int, int] | None = None  # name, offset, size
    label: str | None = None


class WebDataset(Source):
    def __init__(self, address: str) -> None:
        self.address = address

    def state(self) -> str:
        return digest(f"{address}\0{version}" for address, version in remote.files_of(self.address, ".tar"))

    def items(self) -> Iterator[Item]:
        tars = remote.files_of(self.address, ".tar")
        if not tars:
            raise Unreadable("missing", f"{self.address} stands for no .tar")
        for address, version in tars:
            names: dict[str, int] = {}
            for item in _members(address, version):
                count = names[item.name] = names.get(item.name, 0) + 1
                # A second member of the same name is another file; it is found by its number.
                yield item if count == 1 else dataclasses.replace(item, name=f"{item.name}#{count}")

    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        window = _Window()
        for item in items:
            place = json.loads(item.place)
            if "problem" in place:
                yield Unreadable(*place["problem"])
                continue
            try:
                if place["size"] > limit:
                    raise Unreadable("too-large", f"{place['size']} bytes, over the limit of {limit}")
                yield window.read(place["tar"], place["offset"], place["size"])
            except Unreadable as error:
                yield error


class _Window:
    """Reads ahead in one tar: neighbours come with one request."""

    def __init__(self) -> None:
        self._address, self._start, self._content = "", 0, b""

    def read(self, address: str, start: int, size: int) -> bytes:
        if not remote.is_remote(address):
            return remote.read(address, limit=size, start=start, size=size)
        offset = start - self._start
        if address != self._address or offset < 0 or offset + size > len(self._content):
            length = int(remote.version(address).partition("-")[0])
            end = min(length, max(start + size, start + _WINDOW))
            self._content = remote.read(address, limit=end - start, start=start, size=end - start)
            self._address, self._start, offset = address, start, 0
        return self._content[offset : offset + size]


class _Tar(io.RawIOBase):
    """A tar as a file to seek in, fetched a window at a time."""

    def __init__(self, address: str, length: int) -> None:
        self._address, self._length, self._at, self._window = address, length, 0, _Window()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        content = self._window.read(self._address, self._at, size) if size else b""
        self._at += len(content)
        return content


def _members(address: str, version: str) -> Iterator[Item]:
    """One item a sample, one for each member that is no file, and one for a tar that ends badly."""
    tar_name = address.rsplit("/", 1)[-1]

    def item(name: str, label: str | None = None, **place: object) -> Item:
        return Item(f"{tar_name}!{name}", version, label, place=json.dumps(place))

    def finished(sample: _Sample | None) -> Iterator[Item]:
        if sample and sample.image:
            name, offset, size = sample.image
            yield item(name, sample.label, tar=address, offset=offset, size=size)
        elif sample:
            yield item(sample.key, problem=["no-image", f"no member of {sample.key!r} ends with {', '.join(_IMAGES)}"])

    sample: _Sample | None = None
    try:
        length = int(version.partition("-")[0]) if remote.is_remote(address) else 0
        opened = _Tar(address, length) if remote.is_remote(address) else open(address, "rb")  # noqa: SIM115
        with opened as file, tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every one
                if member.isdir():
                    continue
                if not member.isreg():
                    yield item(member.name, problem=["not-a-file", "a link or a device in a tar"])
                    continue
                key, extension = _parts(member.name)
                if sample is None or sample.key != key:
                    yield from finished(sample)
                    sample = _Sample(key)
                if extension in _IMAGES and sample.image is None:
                    sample.image = (member.name, member.offset_data, member.size)
                elif extension in _IMAGES:  # the same key once more: another sample
                    yield from finished(sample)
                    sample = _Sample(key, (member.name, member.offset_data, member.size))
                elif extension in _LABELS and member.size <= _LABEL_BYTES:
                    content = tar.extractfile(member)
                    text = content.read().decode(errors="replace").strip() if content else ""
                    sample.label = text or None
            # What is no header tarfile takes for the end, silently; the end is a block of zeros.
            file.seek(tar.offset)
            mark = file.read(tarfile.BLOCKSIZE)
            if len(mark) < tarfile.BLOCKSIZE or any(mark):
                raise tarfile.ReadError("it has no end mark: cut off, or damaged in a header")
        yield from finished(sample)
        sample = None
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        yield from finished(sample)
        reason = error.reason if isinstance(error, Unreadable) else "damaged-tar"
        yield item("", problem=[reason, f"{address} cannot be read to its end: {error}"])


def _parts(name: str) -> tuple[str, str]:
    """Key and extension: what precedes the first dot of the last part, and what follows the last dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0], base.rpartition(".")[2].lower()


def open_source(location: str) -> WebDataset:
    try:
        source = WebDataset(location)
        source.state()
    except Unreadable as error:
        raise ParamsError(f"source.uri: {error}") from error
    return source
