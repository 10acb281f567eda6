"""Files that are there whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to fill that replaces `path` when the block ends well: after a kill at any moment it holds the old content or
    the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | Path, content: bytes | memoryview | str) -> None:
    """Replaces `path` in one step."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """JSON for people and for Git: indented, in the given order, with a final newline. NaN is refused."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` only when the block ends well; what stood there is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a stage that was killed
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replace_folder(temporary, path)


def replace_folder(new: str | Path, path: str | Path) -> None:
    """`new` takes the name `path`; what stood there is gone."""
    remove_folder(path)
    os.replace(new, path)


def remove_folder(path: str | Path) -> None:
    """Removes a folder, if there is one, so that after a kill it is there whole or not at all."""
    path = Path(path)
    leaving = path.with_name(f".{path.name}.old")
    shutil.rmtree(leaving, ignore_errors=True)
    if path.exists():
        os.replace(path, leaving)
        shutil.rmtree(leaving)


def private_folder(path: str | Path) -> Path:
    """A folder that nobody else on this machine can look into, made if it is not there.

    Raises:
        ValueError: it is somebody else's, or open to others: they may have prepared it.
    """
    path = Path(path)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(f"{path} is not a folder of yours alone; remove it, or set TMPDIR to another place")
    return path


def own_temporary() -> Path:
    """This user's private folder among the machine's temporary ones; raises as `private_folder`."""
    return private_folder(Path(tempfile.gettempdir()) / f"darkmatter-{os.getuid()}")


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
