"""Shards at an address that every node reaches, and a cache of them on each machine.

Files lie there under the sha256 of their bytes, so that data that grows sends only what is new and no name ever means
another content; `DIGEST.json` is the manifest of a data set. The cache keeps to a budget of bytes, is shared by all
processes of a machine, and whatever comes out of it has been compared with its hash.
"""

import contextlib
import fcntl
import hashlib
import heapq
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from darkmatter import files, remote, shards
from darkmatter.remote import Unreadable

_FETCHES = 4  # at once, of each process


class Store:
    def __init__(self, address: str, *, cache: Path, budget: int) -> None:
        """
        Args:
            address: a folder that all nodes share, or s3://, https:// and all else that fsspec knows.
            cache: a folder of this machine.
            budget: bytes that the cache may hold.
        """
        self._address, self._cache, self._budget = address, cache, budget
        self._verified: set[str] = set()
        (cache / "locks").mkdir(parents=True, exist_ok=True)

    def publish(self, folder: Path, manifest: shards.Manifest) -> int:
        """Sends what is not there yet, the manifest last. Returns how many bytes went.

        Raises:
            Unreadable: the address cannot be listed or written.
        """
        from tqdm import tqdm

        there = self._names()
        wanted = [(folder / name, _name(name, sha)) for one in manifest.shards for name, sha in one.files.items()]
        missing = [(path, name) for path, name in wanted if name not in there]
        sizes = [path.stat().st_size for path, _ in missing]
        with (
            ThreadPoolExecutor(_FETCHES) as pool,
            tqdm(desc="publishing", unit="B", unit_scale=True, total=sum(sizes), mininterval=1.0) as progress,
        ):
            for size, _ in zip(sizes, pool.map(lambda one: self._send(*one), missing), strict=True):
                progress.update(size)
        if f"{manifest.digest}.json" not in there:
            remote.write(remote.join(self._address, f"{manifest.digest}.json"), json.dumps(manifest.tree()).encode())
        return sum(sizes)

    def manifest(self, digest: str) -> shards.Manifest:
        """Of the data set with this digest.

        Raises:
            Unreadable: it cannot be had.
            ValueError: it is not what was published.
        """
        content = remote.read(remote.join(self._address, f"{digest}.json"), limit=1 << 32)
        manifest = shards.Manifest.of_tree(json.loads(content))
        if manifest.digest != digest:
            raise ValueError(f"{self._address}/{digest}.json is damaged: its content has another digest")
        return manifest

    def find(self, name: str, sha256: str) -> Path:
        """Where this file of a manifest lies on this machine; fetched if it is not there yet.

        Raises:
            Unreadable: it cannot be had, or is not what was published (`damaged`), twice in a row.
            ValueError: it is larger than the budget.
        """
        path = self._cache / _name(name, sha256)
        with self._lock(sha256[:2]):  # two processes must not fetch the same one
            if path.is_file():
                if sha256 in self._verified or files.sha256(path) == sha256:
                    os.utime(path)  # what was used last leaves last
                    self._verified.add(sha256)
                    return path
                path.unlink()
            content = self._fetch(name, sha256)
            with self._lock("room"):
                self._make_room(len(content))
                files.write(path, content)
            self._verified.add(sha256)
            return path

    def reader(self, manifest: shards.Manifest, split: shards.Split, *, window: int) -> "StoreReader":
        """Reads one split of a published data set, in an order that mixes `window` shards at a time (0: all)."""
        self.check_budget(manifest, split, window=window)
        return StoreReader(self._cache, manifest, split, find=self.find)

    def check_budget(self, manifest: shards.Manifest, split: shards.Split, *, window: int) -> None:
        """Raises ValueError when the cache cannot hold two windows, the one in use and the next."""
        sizes = [shard.bytes for shard in manifest.shards if shard.split == split]
        needed = sum(sizes if not window else heapq.nlargest(2 * window, sizes))
        if needed > self._budget:
            fits = next((n - 1 for n in range(1, len(sizes)) if sum(heapq.nlargest(2 * n, sizes)) > self._budget), 0)
            advice = f", or set pretrain.shuffle_shards to {fits} at most" if fits else ""
            raise ValueError(
                f"the cache at {self._cache} may hold {self._budget >> 20} MiB, but reading {split} takes "
                f"{-(-needed >> 20)} MiB ({'all shards' if not window else f'two windows of {window} shards'}); raise "
                f"place.cache_gibibytes{advice}"
            )

    def _names(self) -> set[str]:
        try:
            return {entry.path for entry in remote.listing(self._address)}
        except Unreadable as error:
            if error.reason == "missing":
                return set()
            raise

    def _send(self, path: Path, name: str) -> None:
        remote.write(remote.join(self._address, name), path.read_bytes())

    def _fetch(self, name: str, sha256: str) -> bytes:
        address = remote.join(self._address, _name(name, sha256))
        for _ in range(2):
            content = remote.read(address, limit=1 << 40)
            found = hashlib.sha256(content).hexdigest()
            if found == sha256:
                return content
        raise Unreadable("damaged", f"{address} ({name}): its sha256 is {found}, twice in a row; publish it again")

    def _make_room(self, size: int) -> None:
        if size > self._budget:
            raise ValueError(
                f"a file of {size} bytes does not fit the cache of {self._budget}; raise place.cache_gibibytes"
            )
        there = []
        for path in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a temporary file of another process, gone by now
                if path.is_file():
                    there.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(used for _, used, _ in there)
        for _, used, path in sorted(there):
            if total + size <= self._budget:
                break
            path.unlink(missing_ok=True)  # who has it open reads on
            total -= used

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self._cache / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class StoreReader(shards.Reader):
    """Fetches ahead what is expected."""

    def __init__(self, folder: Path, manifest: shards.Manifest, split: shards.Split, *, find: shards.Find) -> None:
        super().__init__(folder, manifest, split, find=find)
        self._folder = folder
        self._pool = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch")
        self._expected: Sequence[int] = ()
        self._coming: dict[int, Future[Path]] = {}
        self._guard = threading.Lock()

    def expect(self, shards: Sequence[int]) -> None:
        if shards is self._expected:
            return
        with self._guard:
            self._expected = shards
            before = self._coming
            self._coming = {one: before.get(one) or self._pool.submit(self._path, one) for one in shards}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _open(self, shard: int) -> shards._Open:
        with self._guard:
            coming = self._coming.get(shard)
        if coming is not None:
            coming.result()  # what went wrong is raised here, where it is needed
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):  # it had to leave for another process between the two steps
                return super()._open(shard)
        raise ValueError(f"{self._folder} is too small for all that use it at once; raise place.cache_gibibytes")


def _name(name: str, sha256: str) -> str:
    return sha256 + name[name.index(".") :]
