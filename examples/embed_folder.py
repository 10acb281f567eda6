# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "mlflow==3.17.2", "torch>=2.11", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg",  # of every version
#   "ray==2.60.0", "pyarrow>=20",
# ]
# ///
"""Embeds a folder of images into parquet as a Ray job: `python examples/embed_folder.py PHOTOS EMBEDDINGS`.

Images are the image files below PHOTOS, and those inside its .tar files (WebDataset). EMBEDDINGS gets parts with the columns
`key` (the path, or TAR/MEMBER) and `embedding`; model, version and seal are in the metadata of each. What is no usable image
stands with its reason in _rejects.csv. `pyarrow.parquet.read_table("EMBEDDINGS")` reads all parts.

A part appears whole or not at all, and says by itself which images it is of: a run that was killed goes on where it was, and
a later run embeds only what came since. (A file that was changed under its old name is not seen again.) A folder with the
embeddings of another version is refused.

It starts a Ray on this machine; with RAY_ADDRESS it uses that cluster, whose machines see both folders and the registry:

    ray job submit --working-dir examples -- python embed_folder.py /shared/photos /shared/embeddings

Darkmatter is not needed: the version is all there is to run.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray import cloudpickle
from ray.util import ActorPool

import version
from version import CHAMPION, SUFFIXES, Stop, Version, open_version, run

BATCH = 256  # images in memory at once


@dataclasses.dataclass(frozen=True)
class Part:
    """Some files, or one tar."""

    name: str
    folder: Path
    files: tuple[str, ...] = ()
    tar: str = ""

    def contents(self) -> Iterator[tuple[str, bytes]]:
        for file in self.files:
            yield file, (self.folder / file).read_bytes()
        if self.tar:
            with tarfile.open(self.folder / self.tar) as tar:
                for member in tar:
                    if member.isfile() and member.name.lower().endswith(SUFFIXES):
                        yield f"{self.tar}/{member.name}", tar.extractfile(member).read()  # type: ignore[union-attr]


def write(part: Part, embedder: Version, about: dict[str, str], params: dict, out: Path) -> tuple[int, int]:
    """Embeds a part and writes its file. Returns how many images are in it, and how many were left out."""
    keys: list[str] = []
    vectors: list[np.ndarray] = []
    rejects: dict[str, str] = {}

    def flush(batch: list[tuple[str, bytes]]) -> None:
        answers = embedder.embed([content for _, content in batch], **params)
        for (key, _), answer in zip(batch, answers, strict=True):
            if isinstance(answer, str):
                rejects[key] = answer
            else:
                keys.append(key)
                vectors.append(answer)

    batch: list[tuple[str, bytes]] = []
    for one in part.contents():
        batch.append(one)
        if len(batch) == BATCH:
            flush(batch)
            batch = []
    if batch:
        flush(batch)
    features = embedder.model.metadata.get_output_schema().inputs[0].shape[1]
    flat = pa.array(np.concatenate(vectors) if vectors else np.empty(0, np.float32), pa.float32())
    table = pa.table(
        {"key": pa.array(keys, pa.string()), "embedding": pa.FixedSizeListArray.from_arrays(flat, features)}
    )
    table = table.replace_schema_metadata({**about, "rejects": json.dumps(rejects)})
    temporary = out / f".{part.name}.tmp"
    pq.write_table(table, temporary)
    temporary.rename(out / f"{part.name}.parquet")
    return len(keys), len(rejects)


@ray.remote(max_restarts=3, max_task_retries=3)
class Worker:
    """Holds the version, and embeds parts with it."""

    def __init__(self, registry: str, about: dict[str, str], params: dict, out: Path, device: str) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
        mlflow.set_tracking_uri(registry)
        self._version = open_version(f"models:/{about['model']}/{about['version']}", device=device)
        self._about, self._params, self._out = about, params, out

    def write(self, part: Part) -> tuple[int, int]:
        return write(part, self._version, self._about, self._params, self._out)


def finished(out: Path, about: dict[str, str]) -> tuple[set[str], set[str], dict[str, str]]:
    """Names of the parts that are there, keys of the images in them, and what was left out.

    Raises:
        Stop: a part is of another version, or made with other params.
    """
    names, keys, rejects = set(), set(), {}
    for path in sorted(out.glob("part-*.parquet")):
        found = {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
        for name, value in about.items():
            if found.get(name) != value:
                raise Stop(
                    f"{out} holds embeddings with {name} {found.get(name)}, and this would be {value}; name another folder"
                )
        names.add(path.stem)
        keys.update(pq.read_table(path, columns=["key"])["key"].to_pylist())
        rejects |= json.loads(found["rejects"])
    return names, keys | rejects.keys(), rejects


def remaining(folder: Path, size: int, names: set[str], keys: set[str]) -> list[Part]:
    """What is still to be embedded.

    Raises:
        Stop: there is no image at all.
    """
    if not folder.is_dir():
        raise Stop(f"there is no folder {folder}")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [one for one in found if one.lower().endswith(SUFFIXES)]
    tars = [one for one in found if one.lower().endswith(".tar")]
    if not files and not tars:
        raise Stop(f"{folder} holds no image ({', '.join(SUFFIXES)}) and no .tar")
    new = [one for one in files if one not in keys]
    pieces = [tuple(new[start : start + size]) for start in range(0, len(new), size)]
    parts = [Part(_name("\n".join(piece)), folder, files=piece) for piece in pieces]
    parts += [Part(_name(f"tar {tar}"), folder, tar=tar) for tar in tars]
    return [part for part in parts if part.name not in names]


def _name(text: str) -> str:
    return f"part-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def embed(parts: list[Part], arguments: argparse.Namespace, about: dict[str, str], params: dict) -> int:
    """On the cluster. Returns the number of images."""
    cloudpickle.register_pickle_by_value(version)  # other machines do not have that file
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(address, log_to_driver=False, **({"include_dashboard": False} if address == "local" else {}))
    cpus = int(ray.cluster_resources().get("CPU", 1))
    count = min(len(parts), arguments.workers or cpus)
    options = {"num_cpus": 1, "num_gpus": 1 if arguments.device == "cuda" else 0}
    given = (mlflow.get_tracking_uri(), about, params, arguments.out, arguments.device)
    try:
        pool = ActorPool([Worker.options(**options).remote(*given) for _ in range(count)])
        images, start = 0, time.monotonic()
        for number, (usable, _) in enumerate(
            pool.map_unordered(lambda worker, part: worker.write.remote(part), parts), 1
        ):
            images += usable
            speed = images / (time.monotonic() - start)
            print(f"part {number}/{len(parts)}  {images} images  {speed:.0f} images/s", file=sys.stderr)
    except ray.exceptions.ActorDiedError as error:
        raise Stop(f"a worker could not start, or died too often: {error}") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (OSError, tarfile.TarError, Stop)):
            raise Stop(f"a part could not be made; run it again when that is mended: {error.cause}") from error
        raise
    finally:
        ray.shutdown()
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of images and .tar files")
    parser.add_argument("out", type=Path, help="a folder for the parts")
    parser.add_argument("--part", type=int, default=4096, help="files a part (default: 4096); a .tar is one part")
    parser.add_argument("--workers", type=int, default=0, help="default: one a CPU of the cluster")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU for each worker")
    parser.add_argument("--pooling", choices=["backbone", "patch_mean"], default="backbone")
    parser.add_argument("--normalize", action="store_true", help="embeddings of unit length")
    parser.add_argument("--model", default=CHAMPION)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    remaining(arguments.folder, arguments.part, set(), set())  # before the model is loaded
    opened = open_version(arguments.model)
    params = {"pooling": arguments.pooling, "normalize": arguments.normalize}
    about = {"model": opened.name, "version": opened.number, "seal": opened.seal, "params": json.dumps(params)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for leftover in arguments.out.glob(".part-*.tmp"):
        leftover.unlink()
    names, keys, _ = finished(arguments.out, about)
    parts = remaining(arguments.folder.resolve(), arguments.part, names, keys)
    new = embed(parts, arguments, about, params) if parts else 0
    names, keys, rejects = finished(arguments.out, about)
    with (arguments.out / "_rejects.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key", "reason"), *sorted(rejects.items())])
    print(f"{arguments.out}: {len(keys) - len(rejects)} images in {len(names)} parts, {new} embedded now ({opened})")
    if rejects:
        print(f"{arguments.out / '_rejects.csv'}: {len(rejects)} left out, each with its reason")


if __name__ == "__main__":
    run(main)
