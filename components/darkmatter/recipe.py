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
from darkmatter.training_set import AugmentConfig, ImageSpec, choose_views


def check(tree: Mapping[str, Mapping[str, Any]]) -> None:
    """Builds everything that can be built without data.

    Raises:
        ParamsError: an unknown key, a wrong value, an unknown name, or values that do not go together.
    """
    source = parse(SourceConfig, tree["source"], where="source")
    ingest = parse(IngestConfig, tree["ingest"], where="ingest")
    augment = parse(AugmentConfig, tree["augment"], where="augment")
    pretrain = parse(PretrainConfig, tree["pretrain"], where="pretrain")
    parse(RegisterConfig, tree["register"], where="register")
    parse(PlaceConfig, tree["place"], where="place")
    sources.open_source(source)
    if ingest.val_fraction + ingest.test_fraction >= 1:
        raise ParamsError("ingest.val_fraction and ingest.test_fraction leave nothing to train on")
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
        num_samples=pretrain.batch_size,
    )
    objective = model.build(spec, seed=0)
    views = choose_views(augment.views, augment)
    if views.num_local_views and not objective.takes_local_views:
        name = augment.views["name"]
        raise ParamsError(
            f"augment.views.{name}.local_views: objective {tree['objective']['name']} takes whole views only; set it to 0"
        )
    if views.num_local_views:
        objective.backbone.probe(views.plan(0)[0].size)
