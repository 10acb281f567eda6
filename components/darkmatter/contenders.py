"""Who is scored: the pretrained network, and what it must beat. Each can be sent to a worker, and is opened there."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8

from darkmatter import health, images, lineage, model
from darkmatter.objectives import Objective
from darkmatter.training_set import ImageSpec

Pictures = UInt8[np.ndarray, "batch channels size size"]
Features = Float[np.ndarray, "batch features"]


@runtime_checkable
class Opened(Protocol):
    """A contender in the process that uses it."""

    def embed(self, pictures: Pictures, contents: Sequence[bytes]) -> Features:
        """
        Args:
            pictures: of the size and channels that the pretrained network takes.
            contents: the same as image files, for those that prepare images by themselves.

        Returns:
            float32.
        """


@runtime_checkable
class Contender(Hashable, Protocol):
    """What can be sent to where features are computed."""

    @property
    def name(self) -> str:
        """In tables and pictures."""

    @property
    def digest(self) -> str:
        """Names what decides its features, weights above all: equal digests, equal features."""

    def open(self, device: torch.device) -> Opened:
        """What embeds; slow the first time."""


@dataclasses.dataclass(frozen=True)
class Network:
    """Of a model folder: as it was trained, or as it was before."""

    name: str
    folder: Path
    trained: bool = True

    @functools.cached_property
    def digest(self) -> str:
        _, spec, _ = model.load(self.folder)
        code = Path(model.__file__).parent / "backbones" / f"{spec.backbone['name']}.py"
        return lineage.fingerprint(
            "network", self.trained, model.digest(self.folder), lineage.code_digest([code]), torch.__version__
        )

    def open(self, device: torch.device) -> "OpenNetwork":
        trained, spec, provenance = model.load(self.folder)
        objective = trained if self.trained else model.build(spec, seed=provenance["seed"])
        return OpenNetwork(objective.to(device), device)


@dataclasses.dataclass(frozen=True)
class OpenNetwork:
    objective: Objective
    device: torch.device

    def embed(self, pictures: Pictures, contents: Sequence[bytes] = ()) -> Features:
        """What downstream teams would get."""
        return health.embeddings(self.objective, self.tensor(pictures)).numpy()

    def tensor(self, pictures: Pictures) -> torch.Tensor:
        return torch.from_numpy(pictures).to(self.device).float() / 255


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The pixels themselves."""

    name: str = "pixels"
    digest: str = "pixels"

    def open(self, device: torch.device) -> "Pixels":
        return self

    def embed(self, pictures: Pictures, contents: Sequence[bytes]) -> Features:
        return pictures.reshape(len(pictures), -1).astype(np.float32) / 255


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often each of 8 levels of each channel occurs: M. Swain, D. Ballard, "Color indexing" (1991). The channels are
    counted jointly, so that a colour is one bin; the root makes a cosine of it Bhattacharyya's coefficient."""

    name: str = "histogram"
    digest: str = "histogram-8"

    def open(self, device: torch.device) -> "Histogram":
        return self

    def embed(self, pictures: Pictures, contents: Sequence[bytes]) -> Features:
        levels = (pictures >> 5).astype(np.int64).reshape(*pictures.shape[:2], -1)  # (B, C, S^2)
        bins = np.zeros((len(pictures), levels.shape[2]), np.int64)
        for channel in levels.transpose(1, 0, 2):
            bins = 8 * bins + channel
        count = 8 ** pictures.shape[1]
        rows = [np.bincount(one, minlength=count) for one in bins]
        return np.sqrt(np.stack(rows) / bins.shape[1]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Timm:
    """A network of timm with the weights that timm has for it, and the preparation of images that belongs to them."""

    name: str

    @property
    def digest(self) -> str:
        import timm

        return lineage.fingerprint("timm", self.name, timm.__version__)

    def open(self, device: torch.device) -> Any:
        """
        Raises:
            ValueError: timm has no such network, or its weights could not be fetched.
        """
        import timm

        try:
            network = timm.create_model(self.name, pretrained=True, num_classes=0)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"evaluate.beside: timm cannot give {self.name!r} with its weights: {error}") from error
        return _OpenTimm(network.to(device).eval(), timm.data.resolve_model_data_config(network), device)


@dataclasses.dataclass(frozen=True)
class _OpenTimm:
    network: Any
    data: dict[str, Any]
    device: torch.device

    @torch.no_grad()
    def embed(self, pictures: Pictures, contents: Sequence[bytes]) -> Features:
        channels, size, _ = self.data["input_size"]
        fitted = [images.fit(images.decode(one), size=size, channels=channels) for one in contents]
        batch = torch.from_numpy(np.stack(fitted)).to(self.device).float() / 255
        mean, std = (batch.new_tensor(self.data[name]).view(-1, 1, 1) for name in ("mean", "std"))
        return self.network((batch - mean) / std).float().cpu().numpy()


def beside(choice: str, spec: ImageSpec) -> Contender:
    """What `evaluate.beside` names: `pixels`, `histogram`, a model folder, or a network of timm."""
    if choice in ("pixels", "histogram"):
        return Pixels() if choice == "pixels" else Histogram()
    folder = Path(choice)
    if not (folder / "config.json").is_file():
        return Timm(choice)
    _, other, _ = model.load(folder)
    if (other.images.image_size, other.images.channels) != (spec.image_size, spec.channels):
        raise ValueError(
            f"evaluate.beside: the model in {folder} takes {other.images.channels} x {other.images.image_size} pixels, "
            f"this one {spec.channels} x {spec.image_size}"
        )
    return Network(choice, folder.resolve())
