"""What contenders make of the samples of a split: computed on all cores or GPUs of the cluster, a part at a time, and kept.

A part is named by what decides its numbers: the contender's weights, the bytes of the shard, the change of the pictures, the
code. So a killed evaluation goes on where it was, and after new data only new shards are embedded.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64

from darkmatter import changes, cluster, health, images, lineage, remote, shards, training_set
from darkmatter.changes import Change
from darkmatter.contenders import Contender, OpenNetwork, Pictures
from darkmatter.model import ModelSpec
from darkmatter.stream import permutation

VIEWS = 10
"""Of each sample, for `views`."""
_PART = 512  # samples
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An array with a row for each sample of a split, float32.

    features     (N, D)
    views        (N, VIEWS, D), of views as training draws them
    energies     (N, 2): of two views of the sample, and of one of it and one of another sample
    similarity   (N, grid, grid): the cosine of each patch with the one at the middle of the pasted object

    All but the first are asked of networks with an objective only.
    """

    contender: Contender
    kind: Literal["features", "views", "energies", "similarity"] = "features"
    change: Change | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """From one folder of shards."""

    folder: Path
    spec: ModelSpec
    """What pictures and views are."""
    seed: int
    """Of views and changes."""
    cache: str
    """Address for what was computed."""
    gpu: bool
    """A GPU for each part, else a core."""

    @functools.cached_property
    def manifest(self) -> shards.Manifest:
        return shards.Manifest.load(self.folder)

    def labels(self, split: shards.Split) -> Int64[np.ndarray, " samples"]:
        """-1 where a sample has none."""
        with shards.Reader(self.folder, self.manifest, split) as reader:
            return reader.labels

    def pictures(self, split: shards.Split, numbers: Sequence[int]) -> Pictures:
        """Some samples of a split as the network sees them."""
        with shards.Reader(self.folder, self.manifest, split) as reader:
            return _seen([reader.read(number) for number in numbers], self.spec)

    def arrays(self, split: shards.Split, wanted: Sequence[Wanted]) -> dict[Wanted, np.ndarray]:
        """Within a `cluster.session`.

        Raises:
            ValueError: the split is empty.
            Unreadable: the cache cannot be reached.
        """
        parts = list(self._parts(split))
        if not parts:
            raise ValueError(f"the {split} split is empty; raise ingest.{split}_fraction or give more data")
        found: dict[tuple[int, Wanted], np.ndarray] = {}
        missing: dict[int, list[Wanted]] = {}
        addresses = {
            (number, one): self._address(split, part, one) for number, part in enumerate(parts) for one in wanted
        }
        for place, address in addresses.items():
            if remote.exists(address):
                found[place] = np.load(io.BytesIO(remote.read(address, limit=2**40)), allow_pickle=False)
            else:
                missing.setdefault(place[0], []).append(place[1])
        here = dataclasses.replace(self, folder=self.folder.resolve())
        digest = self.manifest.digest
        tasks = [
            (here, digest, split, parts[number].start, parts[number].stop, tuple(some))
            for number, some in missing.items()
        ]
        answers = cluster.map_tasks(_compute, tasks, f"embedding {split}", total=len(tasks), gpu=self.gpu)
        for number, arrays in zip(missing, answers, strict=True):
            for one, array in zip(missing[number], arrays, strict=True):
                found[number, one] = array
                content = io.BytesIO()
                np.save(content, array)
                remote.write(addresses[number, one], content.getvalue())
        return {one: np.concatenate([found[number, one] for number in range(len(parts))]) for one in wanted}

    def _parts(self, split: shards.Split) -> "list[_Part]":
        parts, first = [], 0
        for shard in self.manifest.shards:
            if shard.split == split:
                for begin in range(0, shard.samples, _PART):
                    stop = min(begin + _PART, shard.samples)
                    parts.append(_Part(shard.sha256, begin, first + begin, first + stop))
                first += shard.samples
        return parts

    def _address(self, split: shards.Split, part: "_Part", wanted: Wanted) -> str:
        decides: list[Any] = [_code(), wanted.contender.digest, wanted.kind, self.spec.images.model_dump()]
        decides += [part.shard, part.begin, part.stop - part.start]
        if wanted.change:
            decides += [str(wanted.change), self.seed, part.start]
        if wanted.kind in ("views", "energies"):
            decides += [self.spec.views, self.seed, split, part.start, self.manifest.digest]
        name = lineage.fingerprint(*decides)
        return remote.join(self.cache, f"{name[:2]}/{name}.npy")


@dataclasses.dataclass(frozen=True)
class _Part:
    """Samples of one shard."""

    shard: str
    """sha256."""
    begin: int
    """In the shard."""
    start: int
    """In the split, as `stop`."""
    stop: int


@functools.cache
def _code() -> str:
    return lineage.code_digest([Path(__file__)])


def _compute(
    extraction: Extraction, digest: str, split: shards.Split, start: int, stop: int, wanted: Sequence[Wanted]
) -> list[np.ndarray]:
    """In a worker."""
    device = torch.device("cuda" if extraction.gpu else "cpu")
    reader = _reader(extraction.folder, digest, split)
    rows: list[list[np.ndarray]] = [[] for _ in wanted]
    for begin in range(start, stop, _BATCH):
        batch = _Samples(extraction, reader, np.arange(begin, min(begin + _BATCH, stop)))
        for row, one in zip(rows, wanted, strict=True):
            row.append(_KINDS[one.kind](_opened(one.contender, device), batch, one.change).astype(np.float32))
    return [np.concatenate(row) for row in rows]


@functools.lru_cache(2)
def _reader(folder: Path, digest: str, split: shards.Split) -> shards.Reader:
    manifest = shards.Manifest.load(folder)
    if manifest.digest != digest:
        raise ValueError(f"{folder} has changed since evaluation began; run it again")
    return shards.Reader(folder, manifest, split)


@functools.lru_cache(8)
def _opened(contender: Contender, device: torch.device) -> Any:
    return contender.open(device)


class _Samples:
    """Some samples of a split; decoded once for all who want something of them."""

    def __init__(self, extraction: Extraction, reader: shards.Reader, numbers: Int64[np.ndarray, " batch"]) -> None:
        self.numbers, self.seed = numbers, extraction.seed
        self._spec, self._reader = extraction.spec, reader
        self._changed = functools.cache(self._change)
        self._drawn = functools.cache(self._draw)

    def pictures(self, change: Change | None) -> tuple[Pictures, Sequence[bytes]]:
        """And the image files; of changed pictures, new ones."""
        return self._changed(change)

    def views(self, epoch: int, *, partners: bool = False) -> Sequence[torch.Tensor]:
        """Two of each sample as training draws them; of the one after it in a random order, with `partners`."""
        return self._drawn(epoch, partners)

    def _change(self, change: Change | None) -> tuple[Pictures, Sequence[bytes]]:
        if change is None:
            contents = [self._reader.read(number) for number in self.numbers.tolist()]
            return _seen(contents, self._spec), contents
        pictures = change.apply(self.pictures(None)[0], self.numbers, seed=self.seed)
        settings = self._spec.images
        colour = np.broadcast_to(pictures, (len(pictures), 3, *pictures.shape[2:])).transpose(0, 2, 3, 1)
        contents = [
            images.encode(picture, max_side=settings.image_size, channels=settings.channels, encoding="png")
            for picture in np.ascontiguousarray(colour)
        ]
        return pictures, contents

    def _draw(self, epoch: int, partners: bool) -> Sequence[torch.Tensor]:
        settings = self._spec.images
        numbers = _partners(self.seed, len(self._reader))[self.numbers] if partners else self.numbers
        prepared = [
            images.encode(images.decode(one), max_side=settings.max_side, channels=settings.channels, encoding="png")
            for one in map(self._reader.read, numbers.tolist())
        ]
        policy = training_set.choose_views(self._spec.views, settings)
        return policy(prepared, numbers, seed=self.seed, epoch=epoch)[:2]


def _seen(contents: Sequence[bytes], spec: ModelSpec) -> Pictures:
    size, channels = spec.images.image_size, spec.images.channels
    fitted = [images.fit(images.decode(one), size=size, channels=channels) for one in contents]
    return np.array(fitted, np.uint8).reshape(-1, channels, size, size)  # of none as well


@functools.lru_cache(2)
def _partners(seed: int, count: int) -> Int64[np.ndarray, " count"]:
    """Another sample for each. Not the next one: neighbours in a source sorted by class are alike."""
    order = permutation(seed, 0, count)
    partners = np.empty_like(order)
    partners[order] = np.roll(order, -1)
    return partners


def _features(opened: Any, batch: _Samples, change: Change | None) -> np.ndarray:
    return opened.embed(*batch.pictures(change))


def _views(opened: OpenNetwork, batch: _Samples, change: Change | None) -> np.ndarray:
    drawn = [view.to(opened.device) for epoch in range(VIEWS // 2) for view in batch.views(epoch)]
    return torch.stack([health.embeddings(opened.objective, view) for view in drawn], 1).numpy()


@torch.no_grad()
def _energies(opened: OpenNetwork, batch: _Samples, change: Change | None) -> np.ndarray:
    first, second = (view.to(opened.device) for view in batch.views(0))
    other = batch.views(0, partners=True)[1].to(opened.device)
    with health.evaluating(opened.objective):
        pairs = [opened.objective.energy(first, second), opened.objective.energy(first, other)]
    return torch.stack(pairs, 1).float().cpu().numpy()


@torch.no_grad()
def _similarity(opened: OpenNetwork, batch: _Samples, change: Change | None) -> np.ndarray:
    backbone = opened.objective.backbone
    pictures, _ = batch.pictures(change)
    with health.evaluating(opened.objective):
        patches = torch.nn.functional.normalize(backbone.patches(opened.tensor(pictures)).float(), dim=2)  # (B, P, T)
    middle = (changes.pasted_at(batch.numbers, seed=batch.seed) * backbone.grid).astype(np.int64)
    asked = torch.from_numpy(middle[:, 0] * backbone.grid + middle[:, 1])
    query = patches[torch.arange(len(patches)), asked.to(patches.device)]
    cosines = torch.einsum("bpt,bt->bp", patches, query)
    return cosines.view(-1, backbone.grid, backbone.grid).cpu().numpy()


_KINDS: Mapping[str, Callable[[Any, _Samples, Change | None], np.ndarray]] = {
    "features": _features,
    "views": _views,
    "energies": _energies,
    "similarity": _similarity,
}
