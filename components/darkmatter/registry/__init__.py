"""The model registry: the gate that decides, the version that is registered, and how it is loaded again.

gate.py       may this model be registered, may it be champion: rules, each with its reason
export.py     the programs of a version (torch.export, ONNX), and how far they are from the network
card.py       the model card
package.py    what a version consists of
hub.py        the backbone as timm loads it
seal.py       the sha256 of every file, and a signature by choice
register.py   the stage: gate, package, seal, version
aliases.py    promotion, rollback, deletion, and the history of it; `python -m darkmatter.registry`
reproduce.py  a version, trained again from its commit
_embedder.py  the code that a version runs
"""

import dataclasses
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from darkmatter import tracking
from darkmatter.params import Config
from darkmatter.registry import seal

INSIDE = Path("artifacts", "version")
"""Of a version's folder: where package.py puts what is ours."""


class CardConfig(Config):
    """What only a person can say of a model. An empty one is refused by the gate, not by `check`."""

    written_for: str
    """The `source.uri` that these words are about; the gate refuses a card that was written for another source."""
    intended_use: str
    """What the model is for."""
    not_for: str
    """What it must not be used for, or not without measuring first."""
    data: str
    """What it was trained on: where the images come from, who is in them, under which terms."""
    licence: str
    """Of the weights, by its SPDX name: `Apache-2.0`."""


class RegisterConfig(Config):
    """The section `register` of params.yaml."""

    model: str = Field(min_length=1, pattern=r"^[^/:@]+$")
    """Name of the registered model."""
    protocol: str
    """The few-shot protocol that the gate compares, as evaluate names it: `5-way 5-shot`."""
    min_energy_margin: float = Field(ge=0.5, le=1)
    """Below it the energy does not tell compatible pairs from others: the model has collapsed and is refused."""
    min_rankme: float = Field(ge=1)
    """Below so many dimensions in use (RankMe of the test embeddings) the model has collapsed and is refused."""
    max_data_shift: float = Field(ge=0, le=1)
    """Of the files that came since the newest version was made: how far the shares of what became of them (each class,
    duplicates, each reason for a reject) may be from those before, beyond chance, as total variation distance. Above it
    something is wrong with the new data, and the model is refused."""
    max_program_difference: float = Field(gt=0)
    """How far an exported program may be from the network, as a share of the largest number that the network gives."""
    allow_dirty: bool
    """Register although files of code or params differ from the commit; the version and its card say which."""
    card: CardConfig
    """What only a person can say of a model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Champion:
    """The version behind the alias `champion`."""

    version: str
    weights_sha256: str
    source: str
    uri: str
    """Of the MLflow server or database."""
    name: str = "champion"

    @property
    def digest(self) -> str:
        """As a contender: its weights, and the version whose code prepares images."""
        return f"champion-{self.version}-{self.weights_sha256}"

    def open(self, device: torch.device) -> "OpenChampion":
        """
        Raises:
            seal.Broken: the version is not what was registered.
        """
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        return OpenChampion(load(self.source, model_config={"device": str(device)}))


@dataclasses.dataclass(frozen=True)
class OpenChampion:
    loaded: Any

    def embed(self, pictures: Any, contents: Sequence[bytes]) -> Float[np.ndarray, "batch features"]:
        """Image files to embeddings, as any downstream team gets them."""
        import pandas

        return np.asarray(self.loaded.predict(pandas.DataFrame({"image": list(contents)})), np.float32)


def connect(uri: str) -> None:
    """Points MLflow at MLFLOW_TRACKING_URI, or else at `uri`; relative SQLite paths start at the current folder.

    Raises:
        mlflow.exceptions.MlflowException: the server cannot be reached.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking.uri_of(uri))


def find(name: str, *, alias: str) -> Any:
    """The version of the registered model `name` behind an alias; None when there is no such model or alias."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def champion(name: str) -> Champion | None:
    """The champion of the registered model `name`; None when there is no such model, no such alias, or no seal on it."""
    version = find(name, alias="champion")
    if version is None:
        return None
    if "seal_sha256" not in version.tags:  # of before there were seals
        print(
            f"darkmatter: {name} version {version.version} is champion but has no seal, so nothing is compared with it",
            file=sys.stderr,
        )
        return None
    import mlflow

    return Champion(
        version=str(version.version),
        weights_sha256=version.tags["weights_sha256"],
        source=f"models:/{name}/{version.version}",
        uri=mlflow.get_tracking_uri(),
    )


def fetch(uri: str, folder: Path, *, public_key: Path | None = None) -> None:
    """A copy of a version as `folder`, which is there only when it was proven to be what was registered.

    Args:
        uri: `models:/NAME/3` or `models:/NAME@champion`.
        folder: a new one.
        public_key: a PEM file; with it the version must be signed by its private half.

    Raises:
        ValueError: another form of `uri`, or a version that has no seal.
        seal.Broken: a file was changed, added or removed, the signature does not fit, or it is not built as ours are.
        mlflow.exceptions.MlflowException: there is no such version.
    """
    import mlflow

    form = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if form is None:
        raise ValueError(f"{uri!r} names no version; write models:/NAME/3 or models:/NAME@champion")
    name, number, alias = form.groups()
    client = mlflow.MlflowClient()
    version = client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias or "")
    if "seal_sha256" not in version.tags:
        raise ValueError(
            f"{name} version {version.version} has no seal, so that it cannot be verified; register it again"
        )
    stored = client.get_model_version_download_uri(name, version.version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        copy = Path(mlflow.artifacts.download_artifacts(artifact_uri=stored, dst_path=scratch))
        _remove_traces(copy)
        seal.verify(copy, version.tags["seal_sha256"])
        _check_form(copy)
        if public_key is not None:
            seal.verify_signature(copy, public_key)
        shutil.move(copy, folder)


@contextmanager
def model_folder(address: str) -> Iterator[Path | None]:
    """The model folder of a version, proven to be what was registered, for the block; or a folder itself.

    Args:
        address: `models:/NAME/3`, `models:/NAME@champion`, a folder, or nothing.

    Yields:
        None for nothing, and for an alias that no version has yet.

    Raises:
        As `fetch`; ValueError: no such folder.
    """
    if not address.startswith("models:/"):
        if address and not (Path(address) / "config.json").is_file():
            raise ValueError(f"{address} is no model folder (it has no config.json) and no models:/NAME/3")
        yield Path(address) if address else None
        return
    name, at, alias = address.removeprefix("models:/").partition("@")
    if at and find(name, alias=alias) is None:
        print(f"there is no {address} yet", flush=True)
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="darkmatter-") as scratch:
        fetch(address, Path(scratch, "version"))
        yield Path(scratch, "version") / INSIDE / "model"


def record_of(name: str, version: str, file: str) -> bytes:
    """A file of a version's records, as `ingest.json`, by itself.

    Raises:
        mlflow.exceptions.MlflowException: there is none.
    """
    import mlflow

    stored = mlflow.MlflowClient().get_model_version_download_uri(name, version)
    with tempfile.TemporaryDirectory() as scratch:
        uri = f"{stored.rstrip('/')}/{INSIDE}/records/{file}"
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch)).read_bytes()


def _remove_traces(copy: Path) -> None:
    """What MLflow leaves in a store of this machine when it loads from there. Nothing of it is loaded from our copy."""
    (copy / "registered_model_meta").unlink(missing_ok=True)
    shutil.rmtree(copy / "__pycache__", ignore_errors=True)


def _check_form(copy: Path) -> None:
    """A seal says that a folder is what somebody registered. Whoever may write to the registry can seal a folder that MLflow
    would unpickle, or whose code it would import from elsewhere; ours runs _embedder.py and nothing else."""
    from mlflow.models import Model

    if not (copy / "MLmodel").is_file():
        raise seal.Broken(f"{copy.name} is no model of MLflow's (it has no MLmodel). Do not use this version")
    flavors = Model.load(str(copy)).flavors
    ours = flavors.get("python_function", {})
    runs = {
        name: ours[name]
        for name in ("loader_module", "model_code_path", "code", "data", "python_model")
        if ours.get(name)
    }
    code = Path(runs.get("model_code_path", "")).name  # MLflow takes the last part as well
    expected = {"loader_module": "mlflow.pyfunc.loaders.code_model", "model_code_path": "_embedder.py"}
    if set(flavors) != {"python_function"} or {**runs, "model_code_path": code} != expected:
        raise seal.Broken(f"{copy.name} is no version of Darkmatter's: it would load {runs}. Do not use this version")


def load(uri: str, *, model_config: Mapping[str, Any] | None = None, public_key: Path | None = None) -> Any:
    """A version that was verified file by file, as `mlflow.pyfunc.load_model` gives it. What is loaded is the verified copy.

    Args:
        uri: `models:/NAME/3` or `models:/NAME@champion`.
        model_config: `device` and `paths`, see _embedder.py.
        public_key: as for `fetch`.

    Raises:
        As `fetch`.
    """
    import mlflow

    place = Path(tempfile.mkdtemp(prefix="darkmatter-"))
    folder = place / "version"
    try:
        fetch(uri, folder, public_key=public_key)
        model = mlflow.pyfunc.load_model(str(folder), model_config=dict(model_config) if model_config else None)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    # The program of the energy is read when it is first asked for.
    weakref.finalize(model.unwrap_python_model(), shutil.rmtree, place, ignore_errors=True)
    return model
