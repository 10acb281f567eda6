"""`folder:/path` or `folder:s3://bucket/path`: every file below a folder, at any depth.

The label of a file is its first folder level. Links to files count where they stay inside; those to folders are not
followed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from darkmatter import remote
from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source, Unreadable


class Folder(Source):
    def __init__(self, root: str) -> None:
        self.root = root

    def items(self) -> Iterator[Item]:
        for entry in remote.listing(self.root):
            label = entry.path.split("/", 1)[0] if "/" in entry.path else None
            yield Item(entry.path, entry.version, label, place=entry.problem)

    def read(self, items: Sequence[Item], *, limit: int) -> Iterator[bytes | Unreadable]:
        inside = None if remote.is_remote(self.root) else Path(self.root)
        for item in items:
            try:
                if item.name.endswith("/"):
                    raise Unreadable("folder", f"it cannot be listed: {item.place}")
                yield remote.read(remote.join(self.root, item.name), limit=limit, inside=inside)
            except Unreadable as error:
                yield error


def open_source(location: str) -> Folder:
    if remote.is_remote(location):
        return Folder(location.rstrip("/"))
    root = Path(location).expanduser()
    if not root.is_dir():
        raise ParamsError(f"source.uri: {location!r} is not a folder")
    return Folder(str(root.resolve()))
