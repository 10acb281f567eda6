"""The code of a registered model: image files in, embeddings out.

MLflow copies this file into every version and runs it there, beside `darkmatter_images.py` (a copy of darkmatter/images.py,
so that a picture is decoded as it was in evaluation). It needs torch and Pillow, and nothing else of Darkmatter.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
import torch

_BATCH = 256


class Embedder(mlflow.pyfunc.PythonModel):
    """Column `image` (the bytes of an image file) -> (N, D) float32."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["backbone"])
        import darkmatter_images  # the version's own copy; MLflow imports this file once before it is beside it

        self._pictures = darkmatter_images
        self._images = json.loads((folder / "config.json").read_text())["images"]
        self._device = torch.device((context.model_config or {}).get("device", "cpu"))
        program = torch.export.load(folder / "backbone.pt2")
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        self._backbone = program.module()

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        contents = list(model_input["image"])
        parts = [self._embed(contents[start : start + _BATCH]) for start in range(0, len(contents), _BATCH)]
        embeddings = np.concatenate(parts)
        if params and params.get("normalize"):
            embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        return embeddings

    def _embed(self, contents: list[bytes]) -> np.ndarray:
        size, channels = self._images["image_size"], self._images["channels"]
        decoded = [self._pictures.decode(bytes(one)) for one in contents]
        pictures = [self._pictures.fit(one, size=size, channels=channels) for one in decoded]
        batch = torch.from_numpy(np.stack(pictures)).to(self._device).float() / 255
        with torch.no_grad():
            return self._backbone(batch).float().cpu().numpy()


mlflow.models.set_model(Embedder())
