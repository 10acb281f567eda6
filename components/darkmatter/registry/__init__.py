"""The model registry: the gate that decides, the package that is registered, and how it is loaded again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from darkmatter import tracking
from darkmatter.params import Config


class RegisterConfig(Config):
    """The section `register` of params.yaml."""

    model: str = Field(min_length=1)
    """Name of the registered model."""
    protocol: str
    """The few-shot protocol that the gate compares, as evaluate names it: `5-way 5-shot`."""
    min_energy_margin: float = Field(ge=0.5, le=1)
    """Below it the energy does not tell compatible pairs from others: the model has collapsed and is refused."""


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
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        return OpenChampion(mlflow.pyfunc.load_model(self.source, model_config={"device": str(device)}))


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


def champion(name: str) -> Champion | None:
    """The champion of the registered model `name`; None when there is no such model or no such alias."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(name, "champion")
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return Champion(
        version=str(version.version),
        weights_sha256=version.tags["weights_sha256"],
        source=f"models:/{name}/{version.version}",
        uri=mlflow.get_tracking_uri(),
    )
