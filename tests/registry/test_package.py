"""Against a real MLflow on SQLite."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trained
from PIL import Image

from darkmatter import images, model, registry
from darkmatter.registry import RegisterConfig, package

CONFIG = RegisterConfig(model="test-backbone", protocol="5-way 5-shot", min_energy_margin=0.9)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    registry.connect(f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def register(folder: Path, scores: dict = trained.SCORES) -> dict:
    (folder.parent / "note.txt").write_text("kept with the run")
    return package.register(
        folder, scores, trained.HISTORY, {"pretrain": {"epochs": 3}}, CONFIG, attachments=[folder.parent / "note.txt"]
    )


def pictures(count: int) -> list[bytes]:
    random = np.random.default_rng(0)
    contents = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (20 + 9 * number, 40, 3), dtype=np.uint8)).save(
            file, format="PNG" if number % 2 else "JPEG"
        )
        contents.append(file.getvalue())
    return contents


def test_a_registered_model_embeds_image_files_as_evaluation_did(store: Path) -> None:
    import mlflow
    import pandas

    trained.save(store / "model")
    assert register(store / "model")["alias"] == ["candidate", "champion"]
    loaded = mlflow.pyfunc.load_model("models:/test-backbone@champion")
    contents = pictures(5)
    embeddings = loaded.predict(pandas.DataFrame({"image": contents}))
    objective, _, _ = model.load(store / "model")
    batch = np.stack([images.fit(images.decode(one), size=28, channels=1) for one in contents])
    with torch.no_grad():
        expected = objective.embed(torch.from_numpy(batch).float() / 255).numpy()
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)
    one = loaded.predict(pandas.DataFrame({"image": contents[:1]}))
    np.testing.assert_allclose(one, expected[:1], rtol=0, atol=1e-5)
    unit = loaded.predict(pandas.DataFrame({"image": contents}), params={"normalize": True})
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    champion = registry.champion("test-backbone")
    assert champion is not None
    np.testing.assert_allclose(champion.embed(contents), expected, rtol=0, atol=1e-5)


def test_a_version_loads_without_darkmatter_and_without_pickle(store: Path) -> None:
    trained.save(store / "model")
    register(store / "model")
    (store / "a.png").write_bytes(pictures(2)[1])
    script = f"""
import sys
sys.path = [p for p in sys.path if "components" not in p]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import mlflow, pandas
mlflow.set_tracking_uri("sqlite:///{store}/mlflow.db")
model = mlflow.pyfunc.load_model("models:/test-backbone@champion")
print(model.predict(pandas.DataFrame({{"image": [open("a.png", "rb").read()]}})).shape)
assert not [name for name in sys.modules if name.split(".")[0] in ("darkmatter", "ray", "dvc")]
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(1, 32)"


def test_equal_weights_make_no_second_version(store: Path) -> None:
    import mlflow

    trained.save(store / "model")
    first, second = register(store / "model"), register(store / "model")
    assert (first["version"], first["new"]) == ("1", True)
    assert (second["version"], second["new"], second["alias"]) == ("1", False, ["candidate", "champion"])
    assert len(mlflow.MlflowClient().search_model_versions("name='test-backbone'")) == 1


def test_champion_moves_only_to_the_better(store: Path) -> None:
    for seed in range(3):
        trained.save(store / f"model{seed}", seed=seed)
    register(store / "model0")
    worse = register(store / "model1", trained.beside_champion("1", -0.1))
    assert (worse["version"], worse["alias"]) == ("2", ["candidate"])
    champion = registry.champion("test-backbone")
    assert champion is not None
    assert champion.version == "1"
    better = register(store / "model2", trained.beside_champion("1", 0.1))
    assert (better["version"], better["alias"]) == ("3", ["candidate", "champion"])


def test_a_refused_model_leaves_no_trace_in_the_registry(store: Path) -> None:
    import mlflow

    trained.save(store / "model")
    bad = json.loads(json.dumps(trained.SCORES))
    bad["energy_margin"]["auroc"]["pretrained"]["mean"] = 0.5
    decision = register(store / "model", bad)
    assert (decision["version"], decision["alias"], decision["new"]) == (None, [], False)
    assert decision["rules"]["not collapsed"] == {"passed": False, "reason": "energy margin 0.5000 < 0.9"}
    assert mlflow.MlflowClient().search_registered_models() == []
    assert registry.champion("test-backbone") is None


def test_a_version_says_where_it_comes_from(store: Path) -> None:
    import mlflow

    trained.save(store / "model")
    register(store / "model")
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("test-backbone", "champion")
    assert version.tags["training_data"] == "d" * 64
    assert len(version.tags["weights_sha256"]) == 64
    assert {"git_commit", "git_dirty", "fingerprint"} <= version.tags.keys()
    for text in ("90.0 ± 1.0 %", "d" * 64, "simclr", "Not for"):
        assert text in version.description
    run = client.get_run(version.run_id)
    assert run.data.params["pretrain.epochs"] == "3"
    assert run.data.metrics["few_shot/5-way 5-shot/pretrained"] == 0.9
    losses = client.get_metric_history(version.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(10, 3.0), (20, 2.0)]
    assert {file.path for file in client.list_artifacts(version.run_id)} >= {"MODEL_CARD.md", "note.txt"}


@pytest.mark.parametrize(
    "backbone",
    [
        {"name": "small_conv"},
        *({"name": "timm", "timm": {"model": name}} for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto")),
    ],
    ids=str,
)
def test_the_exported_program_is_the_network_for_any_batch(backbone: dict, tmp_path: Path) -> None:
    spec = trained.save(tmp_path / "m").model_copy(update={"backbone": backbone})
    spec = spec.model_copy(update={"images": spec.images.model_copy(update={"image_size": 32})})
    network = model.build(spec, seed=0).backbone.eval()
    program = package.export(network, spec).module()
    for batch in (1, 2, 5):
        images = torch.rand(batch, 1, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program(images), network(images), rtol=1e-4, atol=1e-5)
