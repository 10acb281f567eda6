"""Real small models and the scores that go with them."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from darkmatter import model, training_set
from darkmatter.registry import CardConfig, RegisterConfig

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
    "rankme": {"rankme": {"pretrained": {"mean": 20.0, "ci95": None}}},
    "energy_margin": {"auroc": {"pretrained": {"mean": 0.99, "ci95": 0.002}, "untrained": {"mean": 0.6, "ci95": 0.02}}},
}
CARD = CardConfig(
    written_for="builtin:mnist",
    intended_use="Search of digits.",
    not_for="Cheques.",
    data="Scanned digits.",
    licence="Apache-2.0",
)
CONFIG = RegisterConfig(
    model="test-backbone", protocol="5-way 5-shot", min_energy_margin=0.9, min_rankme=5.0,
    max_data_shift=0.25, max_program_difference=1e-4,
    allow_dirty=False, card=CARD,
)  # fmt: skip
PARAMS = {
    "source": {"uri": "builtin:mnist"},
    "pretrain": {"epochs": 3},
    "place": {"mlflow": "postgresql://me:secret@host/db"},
}
INGESTED: dict[str, Any] = {
    "samples": 100, "samples_by_class": {"0": 60, "1": 40}, "duplicates": 2, "near_duplicates": 0,
    "rejects_by_reason": {"truncated": 3},
}  # fmt: skip
HISTORY = [{"step": 10.0, "loss": 3.0, "energy_margin": 0.8}, {"step": 20.0, "loss": 2.0}]


def save(
    folder: Path, *, seed: int = 0, backbone: dict | None = None, objective: dict | None = None
) -> model.ModelSpec:
    """A model folder, as pretrain writes it; the weights differ by seed."""
    spec = model.ModelSpec(
        backbone=backbone or {"name": "small_conv", "small_conv": {"width": 4}},
        objective=objective or {"name": "simclr", "simclr": {"projector": [16, 8]}},
        views={"name": "glyphs"},
        images=training_set.ImageSpec(image_size=28, channels=1, max_side=28, mean=[0.13], std=[0.31]),
        num_samples=100,
    )
    model.save(folder, model.build(spec, seed=seed), spec, provenance(seed))
    return spec


def provenance(seed: int) -> dict[str, Any]:
    """As pretrain writes it."""
    return {
        "fingerprint": f"{seed:016x}", "training_data": "d" * 64, "training_samples": 100, "seed": seed, "steps": 20,
        "versions": {"torch": "2"},
    }  # fmt: skip


def scores_of(folder: Path, scores: dict[str, Any] = SCORES) -> dict[str, Any]:
    """The scores as evaluate writes them of that model folder."""
    return {**copy.deepcopy(scores), "model_sha256": model.digest(folder)}


def pictures(count: int) -> list[bytes]:
    """Image files of several sizes and formats: strokes on grey, not noise."""
    random = np.random.default_rng(0)
    contents = []
    for number in range(count):
        pixels = np.full((20 + 9 * number, 40, 3), random.integers(0, 255, 3), dtype=np.uint8)
        for _ in range(4):
            y, x = random.integers(0, 15), random.integers(0, 30)
            pixels[y : y + random.integers(2, 20), x : x + random.integers(2, 20)] = random.integers(0, 255, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG" if number % 2 else "JPEG")
        contents.append(file.getvalue())
    return contents


def beside_champion(version: str, difference: float) -> dict[str, Any]:
    """The scores, compared with the champion of that version."""
    scores = copy.deepcopy(SCORES)
    scores["champion_version"] = version
    row = scores["few_shot"]["5-way 5-shot"]
    row["champion"] = {"mean": 0.9 - difference, "ci95": 0.01}
    row["advantage"]["champion"] = {"mean": difference, "ci95": 0.01}
    return scores
