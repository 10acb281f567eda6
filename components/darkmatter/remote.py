"""Bytes by address: a path of this machine, or s3://, https:// and all else that fsspec knows.

Whatever goes wrong ends in one exception with a named reason. What may go better next time (a dropped connection, a busy
server, a slow read) is tried again, with a growing pause.
"""

import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from darkmatter import files
from darkmatter.console import Stopped
from darkmatter.redact import redact

Answer = TypeVar("Answer")

#: Seconds without a byte after which a read counts as failed, and how often it is tried in all.
TIMEOUT, ATTEMPTS = 30.0, 5


class Unreadable(Stopped, OSError):
    """Bytes that cannot be had. `reason` is one of a few fixed words, `detail` says more.

    A stage that nobody catches it in ends with it as its message.
    """

    def __init__(self, reason: str, detail: str) -> None:
        detail = redact(detail)  # it is written into rejects.jsonl, and sent between processes
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Something that a listing found."""

    path: str
    """Relative to what was listed, with `/`."""
    version: str
    """Changes when the content does: size and time of change, or the store's own tag."""
    problem: str = ""
    """Why it cannot be read, where the listing knows: a folder that cannot be listed, whose path ends with a slash."""


def is_remote(address: str) -> bool:
    return "://" in address


def is_here(address: str) -> bool:
    """Whether it names a file of this machine, in whatever way."""
    return not is_remote(address) or address.partition("://")[0].lower().rpartition("::")[2] in (
        "file",
        "local",
        "memory",
    )


def join(base: str, path: str) -> str:
    """An address below another; an absolute one stays."""
    if is_remote(path) or path.startswith("/"):
        return path
    return f"{base.rstrip('/')}/{path}"


def read(address: str, *, limit: int, start: int = 0, size: int | None = None, inside: Path | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `start`.

    Args:
        address: path or URL.
        limit: most bytes to read; more are `too-large`.
        start: first byte.
        size: how many; all there are without it.
        inside: a folder of this machine that a link must not lead out of.

    Raises:
        Unreadable: `too-large`, `missing`, `forbidden`, `not-a-file`, `outside`, `connection` or `unreadable`.
    """
    if size is not None and size > limit:
        raise Unreadable("too-large", f"{size} bytes, over the limit of {limit}")
    if is_remote(address):
        return _retried(lambda: _read_remote(address, limit, start, size), address)
    return _read_local(Path(address), limit, start, size, inside)


def write(address: str, content: bytes) -> None:
    """A file with this content, whole or not at all.

    Raises:
        Unreadable: as `read`.
    """
    if not is_remote(address):
        try:
            files.write(address, content)
        except OSError as error:
            raise _named(error, address) from error
        return
    filesystem, path = file_system(address)
    _retried(lambda: filesystem.pipe_file(path, content), address)


def exists(address: str) -> bool:
    """Whether there is a file.

    Raises:
        Unreadable: it cannot be known.
    """
    if not is_remote(address):
        return Path(address).is_file()
    filesystem, path = file_system(address)
    return bool(_retried(lambda: filesystem.exists(path), address))


def send(path: Path, address: str) -> None:
    """A file of this machine, of any size, to an address.

    Raises:
        Unreadable: as `read`.
    """
    filesystem, there = file_system(address)
    _retried(lambda: filesystem.put_file(str(path), there), address)


def fetch(address: str, path: Path) -> None:
    """What lies at an address, of any size, to a file of this machine.

    Raises:
        Unreadable: as `read`.
    """
    filesystem, there = file_system(address)
    _retried(lambda: filesystem.get_file(there, str(path)), address)


def remove(address: str) -> None:
    """A file; nothing when it is not there.

    Raises:
        Unreadable: as `read`.
    """
    if not is_remote(address):
        Path(address).unlink(missing_ok=True)
        return
    filesystem, there = file_system(address)
    _unless_missing(lambda: filesystem.rm_file(there), address)


def remove_folder(address: str) -> None:
    """All that lies below an address; nothing when nothing does.

    Raises:
        Unreadable: as `read`.
    """
    if not is_remote(address):
        files.remove_folder(address)
        return
    filesystem, there = file_system(address)
    _unless_missing(lambda: filesystem.rm(there, recursive=True), address)


def listing(address: str) -> Iterator[Entry]:
    """Every file below a folder, at any depth, in no particular order. A local folder may be of any size.

    Raises:
        Unreadable: the folder itself cannot be listed.
    """
    if is_remote(address):
        yield from _list_remote(address)
    else:
        yield from _list_local(address)


def version(address: str) -> str:
    """Of one file; empty for a remote one whose store names none.

    Raises:
        Unreadable: as `read`.
    """
    if is_remote(address):
        filesystem, path = file_system(address)
        return _version_of(_retried(lambda: filesystem.info(path), address))
    try:
        return _version_of_stat(os.stat(address))
    except (OSError, ValueError) as error:  # as in _read_local
        raise _named(error, address) from error


def open_file(address: str) -> Any:
    """A remote file to seek in, for formats that read here and there.

    Raises:
        Unreadable: as `read`; what goes wrong later is the format's to name.
    """
    filesystem, path = file_system(address)
    return _retried(lambda: filesystem.open(path, "rb"), address)


def expand(address: str) -> list[str]:
    """The addresses that a pattern stands for: `{000..012}` counts, `*` looks, a folder is what lies in it."""
    import braceexpand

    found: list[str] = []
    for one in braceexpand.braceexpand(address):
        if is_remote(one):
            filesystem, path = file_system(one)
            if "*" in path:
                found += sorted(filesystem.unstrip_protocol(p) for p in _retried(lambda: filesystem.glob(path), one))  # noqa: B023
                continue
        elif "*" in one:
            found += sorted(str(path) for path in Path(one[: one.index("*")]).parent.glob(_tail(one)))
            continue
        found.append(one)
    return found


def files_of(address: str, suffix: str) -> list[tuple[str, str]]:
    """(address, version) of every file with this suffix that `expand` names or that lies below a folder it names, sorted.

    Raises:
        Unreadable: as `listing` and `version`.
    """
    found = []
    for one in expand(address):
        if one.endswith(suffix):
            found.append((one, version(one)))
        else:
            found += [(join(one, entry.path), entry.version) for entry in listing(one) if entry.path.endswith(suffix)]
    return sorted(found)


def _tail(pattern: str) -> str:
    parent = Path(pattern[: pattern.index("*")]).parent
    return str(Path(pattern).relative_to(parent))


# --- this machine


def _read_local(path: Path, limit: int, start: int, size: int | None, inside: Path | None) -> bytes:
    try:
        if inside is not None and not Path(os.path.realpath(path)).is_relative_to(inside):
            raise Unreadable("outside", f"{path} leads out of {inside}")
        # A pipe would wait for a writer for ever, a device may do anything: neither is opened for real.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise Unreadable("not-a-file", f"{path} is a {_kind(found.st_mode)}")
            with os.fdopen(handle, "rb", closefd=False) as file:
                file.seek(start)
                content = file.read(min(limit, found.st_size) + 1 if size is None else size)
                if size is None and found.st_size < len(content) <= limit:  # it grows while it is read
                    content += file.read(limit + 1 - len(content))
        finally:
            os.close(handle)
    except Unreadable:
        raise
    except (OSError, ValueError) as error:  # a path with a NUL byte is a ValueError
        raise _named(error, str(path)) from error
    return _checked(content, limit, size, str(path))


def _checked(content: bytes, limit: int, size: int | None, address: str) -> bytes:
    if len(content) > limit:
        raise Unreadable("too-large", f"over the limit of {limit} bytes")
    if size is not None and len(content) != size:
        raise Unreadable("unreadable", f"{address} ended after {len(content)} of {size} bytes")
    return content


def _list_local(root: str) -> Iterator[Entry]:
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{prefix}{entry.name}/")
                    else:
                        yield Entry(prefix + entry.name, _version_of_stat(entry.stat(follow_symlinks=False)))
        except OSError as error:
            if not prefix:
                raise _named(error, root) from error
            yield Entry(prefix, "", problem=str(error))


def _version_of_stat(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _kind(mode: int) -> str:
    tests = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK, "character device": stat.S_ISCHR}
    return next((name for name, test in tests.items() if test(mode)), "block device")


# --- elsewhere


@functools.cache
def _opened(protocol: str, process: int) -> Any:
    """One file system a protocol and process: its event loop does not survive a fork."""
    import aiohttp
    import fsspec

    options: dict[str, Any] = {}
    if protocol == "s3":
        # The checksums that botocore adds by itself are refused by other stores than Amazon's.
        config = {
            "connect_timeout": TIMEOUT,
            "read_timeout": TIMEOUT,
            "retries": {"max_attempts": 1},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        options = {"config_kwargs": config, "default_fill_cache": False, "use_listings_cache": False}
    elif protocol in ("http", "https"):
        options = {
            "client_kwargs": {
                "timeout": aiohttp.ClientTimeout(sock_connect=TIMEOUT, sock_read=TIMEOUT),
                "trust_env": True,  # ~/.netrc, so that no address has to hold a password
            },
            "use_listings_cache": False,
        }
    return fsspec.filesystem(protocol, skip_instance_cache=True, **options)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of a remote address, and the path there.

    Raises:
        Unreadable: `unknown-address`: there is no such kind, or its package is not installed.
    """
    protocol = address.partition("://")[0]
    try:
        filesystem = _opened(protocol, os.getpid())
    except (ValueError, ImportError) as error:
        raise Unreadable("unknown-address", f"{address}: {error}") from error
    return filesystem, filesystem._strip_protocol(address)


def _read_remote(address: str, limit: int, start: int, size: int | None) -> bytes:
    filesystem, path = file_system(address)
    if size is None:
        length = filesystem.info(path).get("size")
        if length is not None and length > limit:
            raise Unreadable("too-large", f"{length} bytes, over the limit of {limit}")
        content = filesystem.cat_file(path)
        if length is not None and len(content) != length:
            raise ConnectionError(f"{len(content)} of {length} bytes came")
        return _checked(content, limit, None, address)
    content = filesystem.cat_file(path, start=start, end=start + size)
    if len(content) != size:
        raise ConnectionError(f"{len(content)} of {size} bytes came")
    return content


def _list_remote(address: str) -> Iterator[Entry]:
    filesystem, root = file_system(address)
    pending = [(root, "")]
    while pending:
        path, prefix = pending.pop()
        found = _retried(lambda: filesystem.ls(path, detail=True), filesystem.unstrip_protocol(path))  # noqa: B023
        for one in found:
            name = one["name"].rstrip("/").rsplit("/", 1)[-1]
            if one["type"] == "directory":
                pending.append((one["name"], f"{prefix}{name}/"))
            elif one["name"].rstrip("/") != path.rstrip("/"):  # some stores keep a folder as an empty object
                yield Entry(prefix + name, _version_of(one))


def _version_of(info: dict[str, Any]) -> str:
    tag = next((str(info[key]) for key in ("ETag", "etag", "LastModified", "last_modified") if info.get(key)), "")
    tag = tag.strip('"')  # a listing has quotes around it, a question after one object has not
    return f"{info.get('size')}-{tag}" if tag else ""


def _retried(call: Callable[[], Answer], address: str) -> Answer:
    """Raises Unreadable: at once where trying again is no use, else after the last attempt."""
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=10.0),
        retry=tenacity.retry_if_exception(lambda error: _named(error, address).reason == "connection"),
        reraise=True,
    )
    try:
        return retrying(call)
    except Unreadable:
        raise
    except Exception as error:  # the one boundary to fsspec, aiohttp and botocore, which raise a dozen types
        raise _named(error, address) from error


def _unless_missing(call: Callable[[], object], address: str) -> None:
    try:
        _retried(call, address)
    except Unreadable as error:
        if error.reason != "missing":
            raise


def _named(error: BaseException, address: str) -> Unreadable:
    if isinstance(error, Unreadable):
        return error
    text = f"{address}: {type(error).__name__}: {error}"
    # Over HTTP fsspec calls everything missing; the answer of the server stands behind it.
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return Unreadable("forbidden", text)
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and not status):
        return Unreadable("missing", text)
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return Unreadable("not-a-file", text)
    if is_remote(address):
        return Unreadable("connection", f"{text} (tried {ATTEMPTS} times)")
    return Unreadable("unreadable", text)
