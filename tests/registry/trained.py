"""Real small models and the scores that go with them."""

import copy
from pathlib import Path
from typing import Any

from darkmatter import model, training_set

SCORES: dict[str, Any] = {
    "champion_version": None,
    "test_samples": 100,
    "labelled": 100,
    "few_shot": {
        "5-way 5-shot": {
            "pretrained": {"mean": 0.9, "ci95": 0.01},
            "untrained": {"mean": 0.5, "ci95": 0.01},
            "pixels": {"mean": 0.8, "ci95": 0.01},
            "advantage": {"untrained": {"mean": 0.4, "ci95": 0.01}, "pixels": {"mean": 0.1, "ci95": 0.01}},
        }
    },
    "energy_margin": {"auroc": {"pretrained": {"mean": 0.99, "ci95": 0.002}, "untrained": {"mean": 0.6, "ci95": 0.02}}},
}
HISTORY = [{"step": 10.0, "loss": 3.0, "energy_margin": 0.8}, {"step": 20.0, "loss": 2.0}]


def save(folder: Path, *, seed: int = 0) -> model.ModelSpec:
    """A model folder, as pretrain writes it; the weights differ by seed."""
    spec = model.ModelSpec(
        backbone={"name": "small_conv", "small_conv": {"width": 4}},
        objective={"name": "simclr", "simclr": {"projector": [16, 8]}},
        views={"name": "glyphs"},
        images=training_set.ImageSpec(image_size=28, channels=1, max_side=28, mean=[0.13], std=[0.31]),
        num_samples=100,
    )
    provenance = {
        "fingerprint": f"{seed:016x}", "training_data": "d" * 64, "training_samples": 100, "seed": seed, "steps": 20,
        "versions": {"torch": "2"},
    }  # fmt: skip
    model.save(folder, model.build(spec, seed=seed), spec, provenance)
    return spec


def beside_champion(version: str, difference: float) -> dict[str, Any]:
    """The scores, compared with the champion of that version."""
    scores = copy.deepcopy(SCORES)
    scores["champion_version"] = version
    row = scores["few_shot"]["5-way 5-shot"]
    row["champion"] = {"mean": 0.9 - difference, "ci95": 0.01}
    row["advantage"]["champion"] = {"mean": difference, "ci95": 0.01}
    return scores
