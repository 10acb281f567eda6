"""Small real runs on the digits, in this process or in one that will be killed."""

import functools
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from darkmatter import model, shards, training_set
from darkmatter.cluster import PlaceConfig
from darkmatter.stream import Stream
from darkmatter.training import PretrainConfig, loop
from darkmatter.training.checkpoint import Checkpoints

CONFIG = PretrainConfig(
    seed=0, warm_start="", epochs=8, batch_size=32, shuffle_shards=0, learning_rate=0.004, warmup_epochs=1,
    weight_decay=0.05,
    clip_norm=0.0, accumulate=1, optimizer="adamw", layer_decay=1.0, weight_decay_end=0.05,
    log_every=1, save_every=7, health_every=10, min_energy_margin=0.0,
)  # fmt: skip


#: A method trained with everything that is off by default.
OTHER = {"mae": {"optimizer": "lars", "accumulate": 2, "layer_decay": 0.8, "weight_decay_end": 0.2, "clip_norm": 1.0}}


def place(folder: Path, **changes: Any) -> PlaceConfig:
    """Two workers of one core each; MLflow is where nobody listens, which costs a message only."""
    values = {
        "workers": 2, "cpus_per_worker": 1, "gpu": False, "compile": False, "activation_checkpointing": False, "fsdp": False,
        "storage": str(folder / "storage"), "data": "", "max_restarts": 2,
        "cache": str(folder / "cache"), "cache_gibibytes": 1.0, "stall_seconds": 60.0, "keep_checkpoints": 2,
        "features": str(folder / "features"),
        "dvc": "", "mlflow": "http://127.0.0.1:9", "signing_key": "",
    }  # fmt: skip
    return PlaceConfig(**{**values, **changes})


def spec(train: Path, objective: str) -> model.ModelSpec:
    tests = Path(__file__).parent.parent
    sys.path += [str(tests), str(tests / "objectives")]
    small = importlib.import_module(f"test_{objective}").SMALL
    return model.ModelSpec(
        backbone={"name": "small_conv", "small_conv": {"width": 4}},
        objective={"name": objective, objective: small},
        views={"name": "glyphs"},
        images=training_set.load_image_spec(train),
        num_samples=shards.Manifest.load(train).samples("train"),
    )


def run(
    train: Path,
    folder: Path,
    objective: str,
    *,
    config: PretrainConfig = CONFIG,
    threads: int = 1,
    keep: int = 2,
    **hooks: Any,
) -> loop.TrainState:
    """`hooks` go to `loop.fit`, but for `prepare`, which is called with the fresh objective."""
    config = config.model_copy(update=OTHER.get(objective, {}) if config is CONFIG else {})
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder.mkdir(parents=True, exist_ok=True)
    made = spec(train, objective)
    views, objective = training_set.choose_views(made.views, made.images), model.build(made, seed=config.seed)
    hooks.pop("prepare", lambda _: None)(objective)
    load = functools.partial(views.prepare, seed=config.seed, whole=objective.num_views)
    with shards.Reader(train, shards.Manifest.load(train), "train") as reader:
        return loop.fit(
            objective,
            Stream(
                reader, load, batch_size=config.batch_size, seed=config.seed, parts=config.accumulate, threads=threads
            ),
            views,
            training_set.held_out(train, 64),
            config,
            checkpoints=Checkpoints(str(folder), keep=keep),
            device=torch.device("cpu"),
            **hooks,
        )


def digest(state: dict) -> str:
    """SHA-256 over every tensor and number of a state, in a fixed order."""
    total = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                total.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        elif isinstance(value, torch.Tensor):
            total.update(value.detach().contiguous().numpy().tobytes())
        else:
            total.update(repr(value).encode())

    add(state)
    return total.hexdigest()


if __name__ == "__main__":
    train_folder, out, name = sys.argv[1:]
    print(json.dumps(digest(run(Path(train_folder), Path(out), name).state_dict())))
