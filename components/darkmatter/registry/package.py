"""The stage: a model folder and its scores -> a version in the registry, or the reasons why not."""

import hashlib
import importlib.metadata
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darkmatter import files, images, lineage, model, tracking
from darkmatter.backbones import Backbone
from darkmatter.registry import RegisterConfig, champion, gate

_EMBEDDER = Path(__file__).with_name("_embedder.py")


def register(
    model_folder: Path,
    scores: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    params: Mapping[str, Any],
    config: RegisterConfig,
    *,
    attachments: Sequence[Path],
) -> dict[str, Any]:
    """Puts the model before the gate and, when it passes, into the registry that `registry.connect` chose.

    Equal weights never make a second version: only the aliases move.

    Args:
        model_folder: what `pretrain` wrote.
        scores: what `evaluate` wrote.
        history: rows of the training, logged by step.
        params: the whole of params.yaml, logged.
        config: the section `register`.
        attachments: files kept with the run.

    Returns:
        {"version": text or None, "alias": [...], "new": bool, "rules": {name: {"passed", "reason"}}}
    """
    rules = gate.to_register(model_folder, scores, config)
    weights = _weights_digest(model_folder)
    version, new = None, False
    aliases: list[str] = []
    if all(rule.passed for rule in rules):
        rules = [*rules, gate.to_be_champion(scores, config, champion(config.model), weights)]
        version = _existing(config.model, weights)
        if version is None:
            version, new = _new_version(model_folder, scores, history, params, config, weights, attachments), True
        aliases = ["candidate", "champion"] if rules[-1].passed else ["candidate"]
        _set_aliases(config.model, version, aliases)
    return {
        "version": version,
        "alias": aliases,
        "new": new,
        "rules": {rule.name: {"passed": rule.passed, "reason": rule.reason} for rule in rules},
    }


def _weights_digest(model_folder: Path) -> str:
    parts = [files.sha256(model_folder / f"{name}.safetensors") for name in ("backbone", "objective")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _existing(name: str, weights: str) -> str | None:
    import mlflow

    versions = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    return next((str(one.version) for one in versions if one.tags.get("weights_sha256") == weights), None)


def _set_aliases(name: str, version: str, aliases: Sequence[str]) -> None:
    import mlflow

    for alias in aliases:
        mlflow.MlflowClient().set_registered_model_alias(name, alias, version)


def _new_version(
    model_folder: Path,
    scores: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    params: Mapping[str, Any],
    config: RegisterConfig,
    weights: str,
    attachments: Sequence[Path],
) -> str:
    import mlflow

    objective, spec, provenance = model.load(model_folder)
    commit = lineage.git_commit()
    tags = {
        "weights_sha256": weights,
        "git_commit": str(commit["commit"]),
        "git_dirty": ", ".join(commit["dirty"]) or "no",
        "training_data": provenance["training_data"],
        "fingerprint": provenance["fingerprint"],
    }
    client = mlflow.MlflowClient()
    record = tracking.begin(client, provenance["fingerprint"], spec.objective["name"])  # pretraining has begun it
    with mlflow.start_run(run_id=record), tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        mlflow.set_tags({**tags, "mlflow.source.git.commit": tags["git_commit"]})
        mlflow.log_params(_flatten(params))
        mlflow.log_metrics(_numbers(scores))
        tracking.send(client, record, history)  # what MLflow missed then
        card = scratch / "MODEL_CARD.md"
        card.write_text(_card(spec, scores, provenance, tags, objective.backbone.num_features, config))
        for path in (card, *attachments):
            mlflow.log_artifact(str(path))
        logged = _log_model(model_folder, objective.backbone, spec, scratch)
        version = mlflow.register_model(logged.model_uri, config.model, tags=tags)
        mlflow.MlflowClient().update_model_version(config.model, version.version, description=card.read_text())
    return str(version.version)


def _log_model(model_folder: Path, backbone: Backbone, spec: model.ModelSpec, scratch: Path) -> Any:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    package = scratch / "backbone"
    shutil.copytree(model_folder, package)
    torch.export.save(export(backbone, spec), package / "backbone.pt2")
    code = scratch / "darkmatter_images.py"
    shutil.copyfile(images.__file__, code)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")  # the signature is given
        return mlflow.pyfunc.log_model(
            name="embedder",
            python_model=str(_EMBEDDER),
            artifacts={"backbone": str(package)},
            code_paths=[str(code)],
            model_config={"device": "cpu"},
            signature=ModelSignature(
                Schema([ColSpec("binary", "image")]),
                Schema([TensorSpec(np.dtype("float32"), (-1, backbone.num_features))]),
                ParamSchema([ParamSpec("normalize", "boolean", False)]),
            ),
            pip_requirements=[
                f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
                for name in ("mlflow", "torch", "numpy", "pandas", "pillow", "jaxtyping")
            ],
        )


def export(backbone: Backbone, spec: model.ModelSpec) -> torch.export.ExportedProgram:
    """The backbone as a graph that needs no code of ours: (B, C, S, S) float32 in [0, 1] -> (B, D), any B."""
    size = spec.images.image_size
    example = torch.zeros(2, spec.images.channels, size, size)  # a batch of one would fix the batch size at one
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(backbone.eval(), (example,), dynamic_shapes={"images": {0: batch}})


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Every mean, under a name that MLflow allows."""
    found: dict[str, float] = {}
    for evaluation, table in scores.items():
        for protocol, row in table.items() if isinstance(table, Mapping) else ():
            for subject, value in row.items():
                if subject not in ("advantage", "skipped"):
                    name = f"{evaluation}/{protocol}/{subject}".replace("=", " ")
                    found[name] = value["mean"]
    return found


def _card(
    spec: model.ModelSpec,
    scores: Mapping[str, Any],
    provenance: Mapping[str, Any],
    tags: Mapping[str, str],
    features: int,
    config: RegisterConfig,
) -> str:
    few_shot = "\n".join(
        f"| {protocol} | "
        + " | ".join(_cell(row.get(subject)) for subject in ("pretrained", "untrained", "pixels", "champion"))
        + " |"
        for protocol, row in scores.get("few_shot", {}).items()
        if "skipped" not in row
    )
    margin = scores["energy_margin"]["auroc"]["pretrained"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return f"""# {config.model}

A backbone ({spec.backbone["name"]}, {features} features) pretrained without labels by {spec.objective["name"]} on \
{provenance["training_samples"]} images, for {provenance["steps"]} steps.

## Use

`mlflow.pyfunc.load_model("models:/{config.model}@champion").predict(pandas.DataFrame({{"image": [file_bytes]}}))`
gives an (N, {features}) float32 array. Images are shrunk to {spec.images.image_size} pixels on the short side, the centre is
cut out, {"grey" if spec.images.channels == 1 else "colour"}. The parameter `normalize` gives unit length.

For: few-shot classification, search and clustering of images like those it was trained on. Not for: images of another kind,
without measuring first.

## How good

Accuracy on the test split, which no other stage reads, with 95% intervals, nearest centroid, the same episodes for all:

| | pretrained | untrained | pixels | champion before |
| --- | --- | --- | --- | --- |
{few_shot or "| no labels | | | | |"}

Energy margin (AUROC, 0.5 is collapse): {_cell(margin, percent=False)}.

## Where it comes from

- commit {tags["git_commit"]}, files changed against it: {tags["git_dirty"]}
- training data {tags["training_data"]}
- training run {tags["fingerprint"]}, seed {provenance["seed"]}, {versions}
- weights {tags["weights_sha256"]}
"""


def _cell(score: Mapping[str, Any] | None, *, percent: bool = True) -> str:
    if score is None:
        return ""
    mean, half = score["mean"], score["ci95"] or 0.0
    return f"{100 * mean:.1f} ± {100 * half:.1f} %" if percent else f"{mean:.4f} ± {half:.4f}"
