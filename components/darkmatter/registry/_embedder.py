"""The code of a registered model: image files in; embeddings, or energies of pairs, out.

MLflow copies this file into every version and runs it there. Beside the programs lies `images.py`, a copy of
darkmatter/images.py, so that a picture is decoded as it was in evaluation. Nothing else of Darkmatter is needed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pandas
import torch

_BATCH = 256


class Embedder(mlflow.pyfunc.PythonModel):
    """Columns: `image` (the bytes of an image file) or `path`; for pairs also `other` or `other_path`.

    Params: `output`: `embedding`, (N, D) float32, or `energy`, (N,) float32, low where the two belong together.
    `pooling`: `backbone`, what was trained and evaluated, or `patch_mean`, the mean over patches. `normalize`: unit length.

    At loading, `model_config`: `device`; `paths`: the folder that paths may lie in. Without it none is read, because a
    server would read any file that a stranger names.
    """

    def load_context(self, context: Any) -> None:
        config = context.model_config or {}
        self._folder = Path(context.artifacts["version"])
        self._device = torch.device(config.get("device") or "cpu")
        self._root = Path(config["paths"]).resolve() if config.get("paths") else None
        self._pictures = _module(self._folder / "images.py")
        self._spec = json.loads((self._folder / "model" / "config.json").read_text())
        self._programs = json.loads((self._folder / "programs.json").read_text())
        self._embedding = self._program("embedding.pt2")
        self._energy: Any = None  # read when it is first asked for

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        chosen = {"output": "embedding", "pooling": "backbone", "normalize": False, **(params or {})}
        _check("output", chosen["output"], ("embedding", "energy"))
        _check("pooling", chosen["pooling"], self._programs["poolings"])
        images = self._column(model_input, "image", "path")
        if chosen["output"] == "energy":
            return self._energies(images, self._column(model_input, "other", "other_path"))
        embeddings = self._embeddings(images, self._programs["poolings"].index(chosen["pooling"]))
        if chosen["normalize"]:
            embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        return embeddings

    def _embeddings(self, contents: Sequence[Any], pooling: int) -> np.ndarray:
        parts = []
        for start in range(0, len(contents), _BATCH):
            with torch.no_grad():
                pooled = self._embedding(self._batch(contents, start, _BATCH))[pooling]
            parts.append(pooled.float().cpu().numpy())
        return np.concatenate(parts)

    def _energies(self, contents: Sequence[Any], others: Sequence[Any]) -> np.ndarray:
        if not self._programs["energy"]:
            raise ValueError(f"this version has no energy: {self._programs['no_energy']}")
        self._energy = self._energy or self._program("energy.pt2")
        parts, at_once = [], self._programs["pairs_at_once"] or _BATCH
        for start in range(0, len(contents), at_once):
            with torch.no_grad():
                energy = self._energy(self._batch(contents, start, at_once), self._batch(others, start, at_once))
            parts.append(energy.float().cpu().numpy())
        return np.concatenate(parts)

    def _column(self, table: pandas.DataFrame, image: str, path: str) -> list[Any]:
        """The contents of one of the two columns: bytes, or paths to be read when their batch comes."""
        given = [name for name in (image, path) if name in table and table[name].notna().any()]
        if len(given) != 1:
            raise ValueError(
                f"give one of the columns {image!r} (bytes of image files) and {path!r}, not {given or 'none'}"
            )
        wanted = str if given == [path] else (bytes, bytearray)
        for row, one in enumerate(table[given[0]]):
            if not isinstance(one, wanted):
                raise ValueError(
                    f"column {given[0]!r}: row {row} is {type(one).__name__}; see the signature of this model"
                )
        if given == [image]:
            return [bytes(one) for one in table[image]]
        if self._root is None:
            raise ValueError(
                f"column {path!r}: this model reads no files until it is loaded with the folder that they lie in: "
                'mlflow.pyfunc.load_model(uri, model_config={"paths": "/data/photos"})'
            )
        return [_inside(self._root, one) for one in table[path]]

    def _batch(self, contents: Sequence[Any], start: int, size: int) -> torch.Tensor:
        images = self._spec["images"]
        pictures = []
        for row, one in enumerate(contents[start : start + size], start):
            try:
                decoded = self._pictures.decode(one.read_bytes() if isinstance(one, Path) else one)
            except self._pictures.Rejected as error:
                raise ValueError(f"row {row} is no usable image: {error}") from error
            pictures.append(self._pictures.fit(decoded, size=images["image_size"], channels=images["channels"]))
        return torch.from_numpy(np.stack(pictures)).to(self._device).float() / 255

    def _program(self, name: str) -> Any:
        program = torch.export.load(self._folder / name)
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        return program.module()


def _check(name: str, given: Any, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"params: there is no {name} {given!r}; there is: {', '.join(allowed)}")


def _inside(root: Path, path: str) -> Path:
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise ValueError(f"{path} is not in {root}, the folder that this model was loaded with")
    return full


def _module(path: Path) -> ModuleType:
    """The version's own copy, under no name that another version's copy could have taken."""
    module = ModuleType("images_of_this_version")
    # Not by an importer: it would leave compiled files in the store, and the seal knows of none.
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


mlflow.models.set_model(Embedder())
