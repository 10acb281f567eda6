"""The backbone in the layout of the Hugging Face hub: config.json, model.safetensors, README.md. timm loads it.

One that is not timm's comes with its code, network.py, which makes it known to timm under its name when it is imported.
"""

import ast
import inspect
import string
from pathlib import Path

from safetensors.torch import save_file

from darkmatter import files, model, plugin
from darkmatter.backbones import Backbone

#: Left out of a plugin's file is what these bring: they check options, and a version's are checked.
_OURS = ("darkmatter", "pydantic")
_NETWORK = string.Template('''\
"""The network `$name`, for timm; it needs torch and timm only. With this folder on the path:

    import network, timm

    timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=10)     # or no classes: features
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from timm.models import build_model_with_cfg, register_model
$source

class Network(torch.nn.Module):
    """What was pretrained, with a layer for classes on top; with none of them it gives the features."""

    def __init__(self, *, num_classes=0, in_chans, img_size, **options):
        super().__init__()
        self.body = build(SimpleNamespace(**options), channels=in_chans, image_size=img_size)
        self.num_features = self.body.num_features
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes = num_classes
        self.fc = torch.nn.Linear(self.num_features, num_classes) if num_classes else torch.nn.Identity()

    def get_classifier(self):
        return self.fc

    def forward_features(self, images):
        return self.body.forward_features(images)

    def forward_head(self, maps, pre_logits=False):
        features = self.body.forward_head(maps)
        return features if pre_logits else self.fc(features)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def _named(weights, model):
    # Those of hub/ are the bare network's; what timm.models.save_for_hf writes later has the names of Network.
    return {name if name.startswith(("body.", "fc.")) else f"body.{name}": value for name, value in weights.items()}


@register_model
def $name(pretrained=False, **arguments):
    return build_model_with_cfg(Network, "$name", pretrained, pretrained_filter_fn=_named, **arguments)
''')


def write(folder: Path, backbone: Backbone, spec: model.ModelSpec, card_text: str) -> None:
    """The network alone: it takes images that were normalised by the mean and deviation in config.json.

    Args:
        folder: new.
        backbone: the trained one.
        spec: what it was built from.
        card_text: README.md.
    """
    network, size = backbone.network, spec.images.image_size
    seen = {
        "input_size": (spec.images.channels, size, size),
        "mean": tuple(spec.images.mean),
        "std": tuple(spec.images.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    if hasattr(network, "pretrained_cfg"):  # one of timm's
        import timm

        timm.models.save_for_hf(network, str(folder), data_config=seen, safe_serialization=True)
    else:
        folder.mkdir()
        weights = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _, options = plugin.choose("backbones", spec.backbone, where="backbone")
        tree = {
            "architecture": spec.backbone["name"],
            "library_name": "timm",
            "num_features": backbone.num_features,
            "model_args": {"in_chans": spec.images.channels, "img_size": size, **options.model_dump()},
            "pretrained_cfg": {**seen, "num_classes": 0, "classifier": "fc"},
        }
        files.write_json(folder / "config.json", tree)
        files.write(folder / "network.py", source(spec.backbone["name"]))
    files.write(folder / "README.md", card_text)


def source(name: str) -> str:
    """The plugin's own file, without its options, as a module that needs torch and timm only."""
    text = inspect.getsource(plugin.load("backbones", name, where="backbone.name"))
    kept = []
    for node in ast.parse(text).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        options = isinstance(node, ast.ClassDef) and node.name == "Config"
        if docstring or options or _imported(node) & set(_OURS):
            continue
        segment = ast.get_source_segment(text, node) or ""
        apart = "\n\n" if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else ""
        kept.append(apart + segment)
    return _NETWORK.substitute(name=name, source="\n".join(kept) + "\n")


def _imported(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return {alias.name.partition(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
