"""Short trainings in this process, by the stages and the loop as they are, for benchmarks that look at what was learned."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from darkmatter import cluster, ingest, model, shards, sources, training_set
from darkmatter.stream import Stream
from darkmatter.training import PretrainConfig, loop
from darkmatter.training.checkpoint import Checkpoints

_HELD_OUT = 512


def prepare(uri: str, folder: Path, augment: Mapping[str, Any], *, val: float, test: float) -> None:
    """`shards` and `train` below `folder`; within a `cluster.session`."""
    config = ingest.IngestConfig(
        samples_per_shard=512, val_fraction=val, test_fraction=test, max_pixels=64_000_000, max_file_mebibytes=256,
        max_decode_seconds=20, max_decode_mebibytes=3072, near_duplicates=-1, drop_removed=False,
    )  # fmt: skip
    ingest.ingest(sources.SourceConfig(uri=uri, labels=True), config, out=folder / "shards")
    training_set.build(folder / "shards", training_set.AugmentConfig(**augment), folder / "train")


def specification(
    folder: Path, objective: dict[str, Any], views: dict[str, Any], backbone: dict[str, Any]
) -> model.ModelSpec:
    return model.ModelSpec(
        backbone=backbone,
        objective=objective,
        views=views,
        images=training_set.load_image_spec(folder / "train"),
        num_samples=shards.Manifest.load(folder / "train").samples("train"),
    )


def train(folder: Path, spec: model.ModelSpec, config: PretrainConfig, out: Path, *, keep: int = 1) -> Checkpoints:
    """Trains on `folder`/train and exports to `out`/model, on as many threads as torch has.

    Args:
        folder: what `prepare` made.
        spec: of the model.
        config: the section `pretrain`.
        out: new; checkpoints lie in it too.
        keep: how many checkpoints stay.
    """
    objective = model.build(spec, seed=config.seed)
    views = training_set.choose_views(spec.views, spec.images)
    load = functools.partial(views.prepare, seed=config.seed, whole=objective.num_views)
    (out / "run").mkdir(parents=True)
    checkpoints = Checkpoints(str(out / "run"), keep=keep)
    with shards.Reader(folder / "train", shards.Manifest.load(folder / "train"), "train") as reader:
        loop.fit(
            objective,
            Stream(
                reader, load, batch_size=config.batch_size, seed=config.seed, parts=1, threads=torch.get_num_threads()
            ),
            views,
            training_set.held_out(folder / "train", _HELD_OUT),
            config,
            checkpoints=checkpoints,
            device=torch.device("cpu"),
        )
    model.save(out / "model", objective, spec, {"seed": config.seed, "fingerprint": "0" * 16})
    return checkpoints


def pretraining(*, seed: int, epochs: int, batch_size: int, save_every: int = 10**9, **changes: Any) -> PretrainConfig:
    """AdamW as in params.yaml; nothing stops it."""
    values = {
        "warm_start": "", "accumulate": 1, "shuffle_shards": 0, "optimizer": "adamw", "learning_rate": 0.004,
        "warmup_epochs": 1, "layer_decay": 1.0, "weight_decay": 0.05, "weight_decay_end": 0.05, "clip_norm": 0.0,
        "log_every": 10**9, "health_every": 10**9, "min_energy_margin": 0.0,
    }  # fmt: skip
    return PretrainConfig(
        seed=seed, epochs=epochs, batch_size=batch_size, save_every=save_every, **{**values, **changes}
    )


def place(folder: Path, **changes: Any) -> cluster.PlaceConfig:
    """This machine, all of it below a folder; for evaluation, unless there are changes."""
    values = {
        "workers": 1, "cpus_per_worker": 1, "gpu": False, "compile": False, "activation_checkpointing": False,
        "fsdp": False, "storage": str(folder / "storage"), "data": "", "cache": str(folder / "cache"),
        "features": str(folder / "features"), "cache_gibibytes": 1.0, "dvc": "", "mlflow": f"sqlite:///{folder}/mlflow.db",
        "signing_key": "", "max_restarts": 0, "stall_seconds": 600.0, "keep_checkpoints": 1,
    }  # fmt: skip
    return cluster.PlaceConfig(**{**values, **changes})
