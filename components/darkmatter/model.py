"""A model as a folder: what it is (config.json) and what it learned (safetensors). No pickle anywhere.

config.json             names and options of backbone and objective, what the images are, where it came from
backbone.safetensors    what downstream teams use
objective.safetensors   the rest of the objective: with it the model can be asked for the energy of a pair
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from darkmatter import files, plugin
from darkmatter.backbones import Backbone
from darkmatter.objectives import Objective
from darkmatter.params import Config
from darkmatter.training_set import ImageSpec

_FORMAT = 2
_PREFIX = "backbone."


class ModelSpec(Config):
    """All that is needed to build the objective, untrained."""

    backbone: dict[str, Any]
    """The section `backbone` of params.yaml."""
    objective: dict[str, Any]
    """The section `objective`."""
    views: dict[str, Any]
    """The section `augment.views`: what a compatible pair is."""
    images: ImageSpec
    """Size, channels and statistics."""
    num_samples: int = Field(gt=0)
    """Of the training split; some methods remember each one."""


def build(spec: ModelSpec, *, seed: int) -> Objective:
    """The objective with fresh weights, the same for equal seeds. Leaves torch's own generator as it was."""
    backbone_module, backbone_options = plugin.choose("backbones", spec.backbone, where="backbone")
    objective_module, objective_options = plugin.choose("objectives", spec.objective, where="objective")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = backbone_module.build(
            backbone_options, channels=spec.images.channels, image_size=spec.images.image_size
        )
        images = spec.images
        backbone = Backbone(network, mean=images.mean, std=images.std, image_size=images.image_size)
        return objective_module.build(objective_options, backbone, spec.num_samples)


def save(folder: Path, objective: Objective, spec: ModelSpec, provenance: dict[str, Any]) -> None:
    """Writes the folder whole or not at all."""
    state = {name: value.detach().cpu().contiguous() for name, value in objective.state_dict().items()}
    backbone, rest = _divide(state)
    with files.whole_folder(folder) as temporary:
        save_file(backbone, temporary / "backbone.safetensors")
        save_file(rest, temporary / "objective.safetensors")
        tree = {
            "format": _FORMAT,
            **spec.model_dump(),
            "num_features": objective.backbone.num_features,
            "provenance": provenance,
        }
        files.write_json(temporary / "config.json", tree)


def load(folder: Path) -> tuple[Objective, ModelSpec, dict[str, Any]]:
    """The trained objective in eval mode, its spec, its provenance.

    Raises:
        ValueError: another format, or weights that do not fit the config.
    """
    tree = _tree(folder / "config.json")
    if tree["format"] != _FORMAT:
        raise ValueError(f"{folder}/config.json has format {tree['format']}; this version reads {_FORMAT}")
    spec = ModelSpec(**{name: tree[name] for name in ModelSpec.model_fields})
    objective = build(spec, seed=0)
    try:
        backbone = {_PREFIX + name: value for name, value in load_file(folder / "backbone.safetensors").items()}
        objective.load_state_dict(backbone | load_file(folder / "objective.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {error}") from error
    return objective.eval(), spec, tree["provenance"]


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
        missing = {"format", "provenance", *ModelSpec.model_fields} - set(tree)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no description of a model: {error}") from error
    if missing:
        raise ValueError(f"{path} is no description of a model: it lacks {', '.join(sorted(missing))}")
    return dict(tree)


def take_over(objective: Objective, spec: ModelSpec, folder: Path) -> list[str]:
    """Gives a fresh objective the weights of a trained one of the same method and backbone.

    Statistics of the images stay its own; what depends on the number of samples, as a memory of each, starts anew where
    that number is another.

    Args:
        objective: of `spec`.
        spec: what is to be trained.
        folder: a model.

    Returns:
        Names of what starts anew.

    Raises:
        ValueError: another backbone, objective or number of channels, or weights that do not fit.
    """
    trained, before, _ = load(folder)
    for what in ("backbone", "objective"):
        asked, there = getattr(spec, what), getattr(before, what)
        chosen = [plugin.choose(f"{what}s", one, where=what)[1] for one in (asked, there)]
        if asked["name"] != there["name"] or chosen[0] != chosen[1]:
            raise ValueError(f"a warm start needs the {what} of {folder}, which is {there}; params.yaml has {asked}")
    if before.images.channels != spec.images.channels:
        raise ValueError(
            f"{folder} was trained on images of {before.images.channels} channels, not {spec.images.channels}"
        )
    ours, theirs = objective.state_dict(), trained.state_dict()
    anew = [name for name, value in ours.items() if value.shape != theirs[name].shape]
    if wrong := [name for name in anew if name.startswith(_PREFIX)]:
        raise ValueError(f"{folder} has weights of another shape: {', '.join(wrong)}; is augment.image_size another?")
    objective.load_state_dict({**theirs, **{name: ours[name] for name in anew}})
    for part in objective.modules():
        if isinstance(part, Backbone):
            part.set_statistics(spec.images.mean, spec.images.std)
    return anew


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of the folder's files: what was evaluated is what is registered."""
    parts = [f"{path.name} {files.sha256(path)}" for path in sorted(folder.iterdir())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _divide(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    backbone = {name[len(_PREFIX) :]: value for name, value in state.items() if name.startswith(_PREFIX)}
    return backbone, {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
