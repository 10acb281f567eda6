"""What a version consists of. A folder that MLflow loads, that needs no Darkmatter, and that no pickle is in.

MLmodel, requirements.txt, ...      MLflow's
_embedder.py                        the code that runs
artifacts/version/
  model/                            config.json and the weights as safetensors; `darkmatter.model.load` opens it
  embedding.pt2 .onnx  energy.pt2   the programs (export.py); programs.json says what they can do and how exact they are
  images.py                         how a file becomes what the network sees
  hub/                              the backbone in the layout of the Hugging Face hub, which timm loads (hub.py)
  records/                          lineage.json, params.yaml, dvc.lock, requirements.lock, metrics, plots, report.html
  MODEL_CARD.md
SHA256SUMS  model.sig               the seal, and a signature by choice (seal.py)
"""

import ast
import dataclasses
import importlib.metadata
import json
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from darkmatter import files, images, model
from darkmatter.backbones import Images
from darkmatter.objectives import Objective
from darkmatter.registry import RegisterConfig, card, export, hub
from darkmatter.registry.export import Difference

_EMBEDDER = Path(__file__).with_name("_embedder.py")
_COLUMNS = {"image": "binary", "path": "string", "other": "binary", "other_path": "string"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a version is made of."""

    folder: Path
    objective: Objective
    spec: model.ModelSpec
    scores: Mapping[str, Any]
    lineage: Mapping[str, Any]
    params: Mapping[str, Any]
    records: Sequence[Path]

    @classmethod
    def read(cls, folder: Path, **rest: Any) -> "Model":
        objective, spec, _ = model.load(folder)
        return cls(folder=folder, objective=objective, spec=spec, **rest)


def contents(made_of: Model, pictures: Sequence[bytes], config: RegisterConfig, folder: Path) -> list[Difference]:
    """Fills `folder` with what stands under artifacts/version, but for records/report.html.

    Args:
        made_of: the model.
        pictures: image files to check the programs on, at least two.
        config: the section `register`.
        folder: new.

    Returns:
        How far each program is from the network.
    """
    spec, objective = made_of.spec, made_of.objective
    folder.mkdir(parents=True)
    shutil.copytree(made_of.folder, folder / "model")
    shutil.copyfile(images.__file__, folder / "images.py")
    seen = as_seen(pictures, spec)
    about, differences = export.write(folder, objective, spec, seen)
    checked = {"images": len(pictures), "differences": {one.program: dataclasses.asdict(one) for one in differences}}
    (folder / "programs.json").write_text(
        json.dumps({**about, "checked": checked}, indent=2) + "\n"
    )  # NaN is refused later
    text = card.write(
        spec, made_of.scores, made_of.lineage, about, differences, objective.backbone.num_features, config
    )
    files.write(folder / "MODEL_CARD.md", text)
    hub.write(folder / "hub", objective.backbone, spec, card.for_hub(text, config.card.licence))
    records = folder / "records"
    records.mkdir()
    for path in made_of.records:
        if (records / path.name).exists():
            raise ValueError(f"two records are called {path.name}: {[str(one) for one in made_of.records]}")
        shutil.copyfile(path, records / path.name)
    files.write_json(records / "lineage.json", dict(made_of.lineage))
    # Without `place`: it changes no result, and an address may hold a password.
    kept = {name: section for name, section in made_of.params.items() if name != "place"}
    files.write(records / "params.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    return differences


def assemble(version: Path, made_of: Model, folder: Path) -> None:
    """Makes `folder` (new), which MLflow loads, around what `contents` made."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    features = made_of.objective.backbone.num_features
    code = version.with_name(_EMBEDDER.name)  # a copy, because MLflow writes the path down
    shutil.copyfile(_EMBEDDER, code)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")  # the signature is given
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(code),
            artifacts={"version": str(version)},
            model_config={"device": "cpu", "paths": ""},
            signature=ModelSignature(
                Schema([ColSpec(kind, name, required=False) for name, kind in _COLUMNS.items()]),
                Schema([TensorSpec(np.dtype("float32"), (-1, features))]),
                ParamSchema(
                    [
                        ParamSpec("output", "string", "embedding"),
                        ParamSpec("pooling", "string", export.POOLINGS[0]),
                        ParamSpec("normalize", "boolean", False),
                    ]
                ),
            ),
            pip_requirements=requirements(),
        )
    for cache in list(folder.rglob("__pycache__")):  # MLflow has run the code once
        shutil.rmtree(cache)


def compare_whole(folder: Path, made_of: Model, pictures: Sequence[bytes]) -> Difference:
    """How far the whole version, from the bytes of a file to the embedding, is from the network."""
    import mlflow
    import pandas

    embeddings = mlflow.pyfunc.load_model(str(folder)).predict(pandas.DataFrame({"image": list(pictures)}))
    with torch.no_grad():
        expected = made_of.objective.embed(as_seen(pictures, made_of.spec)).numpy()
    largest = float(np.abs(embeddings - expected).max())
    return Difference(program="version", largest=largest, scale=float(np.abs(expected).max()))


def as_seen(pictures: Sequence[bytes], spec: model.ModelSpec) -> Images:
    """What the network sees of these files."""
    size, channels = spec.images.image_size, spec.images.channels
    fitted = [images.fit(images.decode(one), size=size, channels=channels) for one in pictures]
    return torch.from_numpy(np.stack(fitted)).float() / 255


def requirements() -> list[str]:
    """What the two files of code in a version import, pinned to what is here."""
    imported: set[str] = set()
    for path in (_EMBEDDER, Path(images.__file__)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    owners = importlib.metadata.packages_distributions()
    names = []
    for module in sorted(imported - sys.stdlib_module_names):
        names.append(module if module in owners[module] else owners[module][0])  # mlflow is in mlflow-skinny too
    return [f"{name.lower()}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]
