"""`folder:/path`: every file below a folder, at any depth. The label of a file is its first folder level."""

import hashlib
import os
from pathlib import Path

from darkmatter.params import ParamsError
from darkmatter.sources import Item, Source


class Folder(Source):
    def __init__(self, root: Path) -> None:
        self.root = root

    def items(self) -> list[Item]:
        return [Item(name, name.split("/", 1)[0] if "/" in name else None) for name, _ in self._walk()]

    def read(self, item: Item) -> bytes:
        path = self.root / item.name
        if not path.is_file() or not path.resolve().is_relative_to(self.root):
            raise FileNotFoundError(f"{item.name} is not a regular file inside {self.root}")
        return path.read_bytes()

    def state(self) -> str:
        digest = hashlib.sha256()
        for name, stat in self._walk():
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _walk(self) -> list[tuple[str, os.stat_result]]:
        found = []
        for folder, _, names in os.walk(self.root):  # links to folders are not followed: no loops
            for name in names:
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, self.root), os.lstat(path)))
        return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def open_source(location: str) -> Folder:
    root = Path(location).expanduser()
    if not root.is_dir():
        raise ParamsError(f"source.uri: {location!r} is not a folder")
    return Folder(root.resolve())
