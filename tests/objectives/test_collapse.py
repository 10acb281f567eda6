"""Every objective on real digits: its energy tells compatible pairs from others, and its known collapse is noticed."""

import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toys import NAMES, own_tests

from conftest import make_digits
from darkmatter import health, model, shards, training_set
from darkmatter.registry import RegisterConfig, gate
from darkmatter.stream import Stream
from darkmatter.training import PretrainConfig, history, loop
from darkmatter.training.checkpoint import Checkpoints

BATCH, STEPS = 64, 126
#: One of each family; the others take another ten minutes and are run by `make test-long`.
ALWAYS = ("simclr", "swav", "dino", "vicreg", "mae", "denoising", "ijepa", "vqvae", "bigan")
CHOSEN = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
Outcome = tuple[list[float], str | None]
"""Energy margins, one a look, and the reason if the run stopped itself."""


def train(name: str, digits: str, folder: str, broken: bool) -> Outcome:
    """A short run; with `broken`, of the method without what keeps it from collapsing."""
    torch.set_num_threads(1)
    tests, train_folder = own_tests(name), Path(digits) / "train"
    manifest = shards.Manifest.load(train_folder)
    views: dict[str, Any] = getattr(tests, "VIEWS", {})
    spec = model.ModelSpec(
        backbone={"name": "small_conv", "small_conv": {"width": 16}},
        objective={"name": name, name: tests.DIGITS},
        views={"name": "glyphs", "glyphs": views},
        images=training_set.load_image_spec(train_folder),
        num_samples=manifest.samples("train"),
    )
    config = PretrainConfig(
        seed=0, warm_start="", epochs=STEPS // (manifest.samples("train") // BATCH), batch_size=BATCH,
        shuffle_shards=0, learning_rate=0.004,
        warmup_epochs=1, weight_decay=0.05, weight_decay_end=0.05, clip_norm=0.0, accumulate=1,
        optimizer="adamw", layer_decay=1.0, log_every=30, save_every=1000, health_every=9,
        min_energy_margin=0.8,
    )  # fmt: skip
    method = model.build(spec, seed=0)
    patch = pytest.MonkeyPatch()
    if broken:
        tests.collapse(method, patch)
    policy = training_set.choose_views(spec.views, spec.images)
    load = functools.partial(policy.prepare, seed=0, whole=method.num_views)
    reason = None
    try:
        with shards.Reader(train_folder, manifest, "train") as reader:
            loop.fit(
                method,
                Stream(reader, load, batch_size=BATCH, seed=0),
                policy,
                training_set.held_out(train_folder, 256),
                config,
                checkpoints=Checkpoints(folder, keep=2),
                device=torch.device("cpu"),
            )
    except health.Collapsed as error:
        reason = str(error)
    finally:
        patch.undo()
    return [row["energy_margin"] for row in history.read(folder) if "energy_margin" in row], reason


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> Iterator[dict[tuple[str, bool], Future[Outcome]]]:
    """A healthy and a broken run of every objective that is asked for, two at a time."""
    asked = {one.callspec.params["name"] for one in request.session.items if one.path == Path(__file__)}
    root = tmp_path_factory.mktemp("collapse")
    digits = make_digits(root / "digits", every=2)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {}
        for name in sorted(asked):
            for broken in (False, True):
                folder = root / f"{name}-{broken}"
                folder.mkdir()
                futures[name, broken] = pool.submit(train, name, str(digits), str(folder), broken)
        yield futures


@pytest.mark.parametrize("name", CHOSEN)
def test_a_healthy_run_ends_with_an_energy_that_tells_pairs_apart(name: str, runs: Any) -> None:
    margins, reason = runs[name, False].result()
    assert reason is None, margins
    assert margins[-1] > 0.8, margins
    assert passes_the_gate(margins[-1])


@pytest.mark.parametrize("name", CHOSEN)
def test_the_known_collapse_of_the_method_stops_the_run_and_the_gate_refuses_it(name: str, runs: Any) -> None:
    margins, reason = runs[name, True].result()
    assert reason is not None, margins
    assert reason.startswith("collapse at step")
    assert "AUROC below 0.8" in reason
    assert not passes_the_gate(margins[-1])


def passes_the_gate(margin: float) -> bool:
    values = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())["register"]
    scores = {"energy_margin": {"auroc": {"pretrained": {"mean": margin, "ci95": 0.01}}}}
    return gate.not_collapsed(scores, RegisterConfig(**values)).passed
