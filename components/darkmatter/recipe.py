"""The whole of params.yaml at once: what `check` refuses before the first stage spends any time."""

from collections.abc import Mapping
from typing import Any

from darkmatter import evaluate, model, plugin, sources
from darkmatter.cluster import PlaceConfig
from darkmatter.ingest import IngestConfig
from darkmatter.params import ParamsError, parse
from darkmatter.registry import RegisterConfig
from darkmatter.sources import SourceConfig
from darkmatter.training import PretrainConfig
from darkmatter.training_set import AugmentConfig, ImageSpec

#: Sections whose keys are fixed; those of the others are names of plugins.
TYPED = {
    "source": SourceConfig,
    "ingest": IngestConfig,
    "augment": AugmentConfig,
    "pretrain": PretrainConfig,
    "register": RegisterConfig,
    "place": PlaceConfig,
}


def check(tree: Mapping[str, Mapping[str, Any]]) -> None:
    """Builds everything that can be built without data.

    Raises:
        ParamsError: an unknown key, a wrong value, an unknown name, or values that do not go together.
    """
    parsed = {name: parse(config_type, tree[name], where=name) for name, config_type in TYPED.items()}
    sources.open_source(parsed["source"])  # type: ignore[arg-type]
    if parsed["ingest"].val_fraction + parsed["ingest"].test_fraction >= 1:
        raise ParamsError("ingest.val_fraction and ingest.test_fraction leave nothing to train on")
    augment = parsed["augment"]
    sections = {
        "augmentations": ("augment.views", augment.views),
        "objectives": ("objective", tree["objective"]),
        "backbones": ("backbone", tree["backbone"]),
    }
    for folder, (where, section) in sections.items():
        plugin.choose(folder, section, where=where)
        for name in section:  # those that wait for their turn as well
            if name != "name":
                plugin.options(plugin.load(folder, name, where=where), section, where=where)
    evaluate.plan(tree["evaluate"])
    spec = model.ModelSpec(
        backbone=dict(tree["backbone"]),
        objective=dict(tree["objective"]),
        views=augment.views,
        images=ImageSpec(
            image_size=augment.image_size,
            channels=augment.channels,
            max_side=augment.max_side,
            mean=[0.5] * augment.channels,
            std=[0.5] * augment.channels,
        ),
    )
    model.build(spec, seed=0)
