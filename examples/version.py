"""What the examples share: a version of the registry, verified file by file, opened, and asked about image files.

It needs no Darkmatter. Copy this file beside the example that you start from. The registry is MLFLOW_TRACKING_URI, or
mlflow.db in this folder.
"""

import atexit
import dataclasses
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
from mlflow.exceptions import MlflowException

CHAMPION = "models:/darkmatter-backbone@champion"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Stop(Exception):
    """A mistake that a person can mend: ends an example with its message and status 2."""


@dataclasses.dataclass(frozen=True)
class Version:
    """A version that is what was registered."""

    name: str
    number: str
    seal: str
    """sha256 of its SHA256SUMS: two versions never share it."""
    folder: Path
    """The verified copy; what is in it stands in docs/load.md. It is removed when the program ends."""
    model: Any
    """As `mlflow.pyfunc.load_model` gives it."""

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"

    @property
    def uri(self) -> str:
        """Names this version for ever, whatever becomes of the alias."""
        return f"models:/{self.name}/{self.number}"

    def embed(self, contents: Sequence[bytes], **params: Any) -> list[np.ndarray | str]:
        """Of each image file its embedding, (D,) float32, or the reason why it is no usable image."""
        try:
            return list(self.model.predict(pandas.DataFrame({"image": list(contents)}), params=params))
        except ValueError as error:
            if "is no usable image" not in str(error):
                raise
            if len(contents) == 1:
                return [str(error).partition("is no usable image: ")[2]]
            half = len(contents) // 2  # a batch that holds a broken file is asked again in halves
            return self.embed(contents[:half], **params) + self.embed(contents[half:], **params)


def open_version(uri: str, **model_config: Any) -> Version:
    """
    Args:
        uri: `models:/NAME/3` or `models:/NAME@champion`.
        model_config: as for `mlflow.pyfunc.load_model`: `device`, `paths`.

    Raises:
        Stop: there is no such version, or it is not what was registered, or the registry does not answer.
    """
    place = mlflow.get_tracking_uri()
    path = place.removeprefix("sqlite:///")
    if path != place and not Path(path).is_file():  # MLflow would make an empty one
        raise Stop(f"there is no registry at {path}; set MLFLOW_TRACKING_URI to its address")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 keep one waiting for minutes
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    form = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if form is None:
        raise Stop(f"{uri!r} names no version; write models:/NAME/3 or models:/NAME@champion")
    name, number, alias = form.groups()
    client = mlflow.MlflowClient()
    temporary = Path(tempfile.mkdtemp(prefix="version-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    try:
        found = client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
        stored = client.get_model_version_download_uri(name, found.version)
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=stored, dst_path=str(temporary)))
    except MlflowException as error:
        raise Stop(f"{uri} in the registry {place}: {error.message}") from error
    seal = found.tags.get("seal_sha256")
    if seal is None:
        raise Stop(f"{uri} has no seal, so that nobody can tell whether it is what was registered")
    _verify(folder, seal)
    model = mlflow.pyfunc.load_model(str(folder), model_config=model_config or None)
    return Version(name, str(found.version), seal, folder, model)


def _verify(folder: Path, seal: str) -> None:
    """What `registry.load` of Darkmatter does: every file is the one that was registered, and there is no other."""
    (folder / "registered_model_meta").unlink(missing_ok=True)  # MLflow's traces in a store of this machine
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    sums = folder / "SHA256SUMS"
    wrong = ["SHA256SUMS"] if not sums.is_file() or _sha256(sums) != seal else []
    if not wrong:
        sealed = {name: digest for digest, name in (line.split("  ", 1) for line in sums.read_text().splitlines())}
        files = {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()
        }
        files -= {"SHA256SUMS", "model.sig"}
        changed = {name for name in files & sealed.keys() if _sha256(folder / name) != sealed[name]}
        wrong = sorted((files ^ sealed.keys()) | changed)
    if wrong:
        raise Stop(f"this version is not what was registered ({', '.join(wrong[:5])}); do not use it, tell who made it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pictures(folder: Path) -> list[Path]:
    """The image files below a folder, in order.

    Raises:
        Stop: there is none.
    """
    if not folder.is_dir():
        raise Stop(f"there is no folder {folder}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise Stop(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return found


def embed_files(
    version: Version, paths: Sequence[Path], *, batch: int = 256, **params: Any
) -> tuple[np.ndarray, list[Path], dict[Path, str]]:
    """Embeddings (N, D) of the usable files, those files, and of each other one the reason."""
    vectors, usable, rejects = [], [], {}
    for some in _batches(paths, batch):
        for path, answer in zip(some, version.embed([path.read_bytes() for path in some], **params), strict=True):
            if isinstance(answer, str):
                rejects[path] = answer
            else:
                vectors.append(answer)
                usable.append(path)
    return np.array(vectors, np.float32), usable, rejects


def tell(rejects: dict[Path, str]) -> None:
    """Names what was left out."""
    for path, reason in rejects.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)


def _batches(items: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run(main: Callable[[], None]) -> None:
    """Runs an example: a mistake ends it with its message."""
    try:
        main()
    except Stop as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
