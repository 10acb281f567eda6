"""The stage, against a real MLflow on SQLite in a repository of Git."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import trained
from safetensors.torch import load_file, save_file

import fresh
from darkmatter import model, registry
from darkmatter.registry import RegisterConfig, aliases, export, package, seal
from darkmatter.registry.register import register as stage

CHAMPION = "models:/test-backbone@champion"


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments], check=True)


def repository(folder: Path) -> Path:
    """A committed repository with an empty registry."""
    os.chdir(folder)
    for name in ("params.yaml", "dvc.lock", "requirements.lock", "note.txt"):
        (folder / name).write_text(f"{name} of the test\n")
    (folder / "ingest.json").write_text(json.dumps(trained.INGESTED))
    git("init", "-q")
    git("add", "params.yaml", "requirements.lock")
    git("commit", "-qm", "start")
    registry.connect(f"sqlite:///{folder}/mlflow.db")
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return repository(tmp_path)


def register(
    folder: Path,
    scores: dict[str, Any] | None = None,
    *,
    config: RegisterConfig = trained.CONFIG,
    missing: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Any]:
    names = [name for name in ("dvc.lock", "requirements.lock", "note.txt", "ingest.json") if name not in missing]
    return stage(
        folder,
        trained.scores_of(folder) if scores is None else scores,
        trained.HISTORY,
        trained.PARAMS,
        config,
        ingested=trained.INGESTED,
        pictures=trained.pictures(5),
        records=[folder.parent / name for name in (*names, "not-there.png")],
        page=lambda decision: f"<p>version {decision['version']}: {decision['alias']}</p>",
        **options,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One version, registered once for the tests that only look at it."""
    before = Path.cwd()
    folder = repository(tmp_path_factory.mktemp("made"))
    trained.save(folder / "model")
    (folder / "decision.json").write_text(json.dumps(register(folder / "model")))
    os.chdir(before)
    return folder


@pytest.fixture
def there(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    registry.connect(f"sqlite:///{made}/mlflow.db")
    return made


def expected(folder: Path, contents: list[bytes]) -> np.ndarray:
    objective, spec, _ = model.load(folder)
    with torch.no_grad():
        return objective.embed(package.as_seen(contents, spec)).numpy()


def broken(decision: dict[str, Any]) -> dict[str, str]:
    return {name: rule["reason"] for name, rule in decision["rules"].items() if not rule["passed"]}


# --- one healthy model


def test_a_healthy_model_passes_and_becomes_the_first_champion(there: Path) -> None:
    decision = json.loads((there / "decision.json").read_text())
    assert (decision["version"], decision["alias"], decision["new"]) == ("1", ["candidate", "champion"], True)
    assert broken(decision) == {}
    assert list(decision["rules"])[-2:] == ["programs agree", "beats the champion"]
    reason = decision["rules"]["programs agree"]["reason"]
    assert reason.startswith("largest difference on 5 real images at most 0.0001")
    for program in ("embedding.pt2", "embedding.onnx", "energy.pt2", "version"):
        assert program in reason


def test_a_registered_model_embeds_image_files_as_evaluation_did(there: Path) -> None:
    loaded = registry.load(CHAMPION)
    contents = trained.pictures(7)
    embeddings = loaded.predict(pandas.DataFrame({"image": contents}))
    wanted = expected(there / "model", contents)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, wanted, rtol=0, atol=1e-5)
    one = loaded.predict(pandas.DataFrame({"image": contents[:1]}))
    np.testing.assert_allclose(one, wanted[:1], rtol=0, atol=1e-5)
    unit = loaded.predict(pandas.DataFrame({"image": contents}), params={"normalize": True})
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    champion = registry.champion("test-backbone")
    assert champion is not None
    np.testing.assert_allclose(champion.open(torch.device("cpu")).embed(None, contents), wanted, rtol=0, atol=1e-5)


def test_it_gives_the_energy_of_pairs(there: Path) -> None:
    loaded = registry.load(CHAMPION)
    x, y = trained.pictures(6), trained.pictures(6)[::-1]
    energies = loaded.predict(pandas.DataFrame({"image": x, "other": y}), params={"output": "energy"})
    objective, spec, _ = model.load(there / "model")
    with torch.no_grad():
        wanted = objective.energy(package.as_seen(x, spec), package.as_seen(y, spec)).numpy()
    assert energies.dtype == np.float32
    np.testing.assert_allclose(energies, wanted, rtol=1e-5)
    same = loaded.predict(pandas.DataFrame({"image": x, "other": x}), params={"output": "energy"})
    assert (same <= energies + 1e-5).all()


def test_pooling_chooses_between_the_backbone_s_own_and_the_mean_of_its_patches(there: Path) -> None:
    loaded = registry.load(CHAMPION)
    contents = trained.pictures(3)
    pooled = loaded.predict(pandas.DataFrame({"image": contents}), params={"pooling": "patch_mean"})
    objective, spec, _ = model.load(there / "model")
    with torch.no_grad():
        wanted = objective.backbone.patches(package.as_seen(contents, spec)).mean(1).numpy()
    np.testing.assert_allclose(pooled, wanted, rtol=0, atol=1e-5)
    assert pooled.shape != loaded.predict(pandas.DataFrame({"image": contents})).shape


def test_paths_are_read_only_in_the_folder_that_was_named_at_loading(there: Path, tmp_path: Path) -> None:
    contents = trained.pictures(2)
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    (tmp_path / "secret").write_bytes(contents[0])
    loaded = registry.load(CHAMPION, model_config={"paths": str(tmp_path / "photos")})
    paths = pandas.DataFrame({"path": ["a", str(tmp_path / "photos" / "b")]})
    np.testing.assert_allclose(loaded.predict(paths), expected(there / "model", contents), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"is not in .*photos, the folder that this model was loaded with"):
        loaded.predict(pandas.DataFrame({"path": ["../secret"]}))
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is not in"):
        loaded.predict(pandas.DataFrame({"path": ["link"]}))
    with pytest.raises(ValueError, match="reads no files until it is loaded with the folder"):
        registry.load(CHAMPION).predict(paths)


@pytest.mark.parametrize(
    ("columns", "params", "message"),
    [
        ({"image": [b"text"]}, {}, "row 0 is no usable image: not-an-image"),
        ({"image": ["text"]}, {}, "column 'image': row 0 is str"),
        ({"image": [b"", None]}, {}, "column 'image': row 1 is NoneType"),
        ({"image": [b"x"], "path": ["x"]}, {}, r"give one of the columns 'image' .* not \['image', 'path'\]"),
        ({"other": [b"x"]}, {}, "give one of the columns 'image' .* not none"),
        ({"image": [b"x"]}, {"output": "energy"}, "give one of the columns 'other'"),
        ({"image": [b"x"]}, {"output": "text"}, "there is no output 'text'; there is: embedding, energy"),
        ({"image": [b"x"]}, {"pooling": "cls"}, "there is no pooling 'cls'; there is: backbone, patch_mean"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_it_cannot_use_is_named(columns: dict, params: dict, message: str, loaded: Any) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.predict(pandas.DataFrame(columns), params=params)


@pytest.fixture(scope="module")
def loaded(made: Path) -> Any:
    """As a team without Darkmatter loads it: from where it lies in the store, which must stay as it is."""
    import mlflow

    (folder,) = (path.parent for path in made.glob("mlruns/**/MLmodel"))
    return mlflow.pyfunc.load_model(str(folder))


_STRANGER = """
import mlflow, pandas, sys
store, image = sys.argv[1:]
mlflow.set_tracking_uri(store)
model = mlflow.pyfunc.load_model("models:/test-backbone@champion")
image = open(image, "rb").read()
print(model.predict(pandas.DataFrame({"image": [image]})).shape)
print(model.predict(pandas.DataFrame({"image": [image], "other": [image]}), params={"output": "energy"}).shape)
assert not {name.partition(".")[0] for name in sys.modules} & {"darkmatter", "ray", "dvc", "timm"}
"""


def test_a_version_loads_with_its_own_requirements_alone_and_without_pickle(there: Path, tmp_path: Path) -> None:
    """Every module of a distribution that is not among them, or needed by them, cannot be imported."""
    (tmp_path / "a.png").write_bytes(trained.pictures(2)[1])
    (requirements,) = there.glob("mlruns/**/requirements.txt")
    names = {line.partition("==")[0] for line in requirements.read_text().splitlines()}
    assert names == {"mlflow", "torch", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg"}
    (tmp_path / "stranger.py").write_text(_STRANGER)
    runner, store, image = Path(fresh.__file__), f"sqlite:///{there}/mlflow.db", tmp_path / "a.png"
    run = subprocess.run(
        [sys.executable, runner, requirements, tmp_path / "stranger.py", store, image],
        capture_output=True, text=True, cwd=tmp_path,
        env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["(1, 32)", "(1,)"]


_ELSEWHERE = """
import importlib.metadata, json, sys
import mlflow, numpy, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/test-backbone@champion")
images = [open(name, "rb").read() for name in sys.argv[3:]]
table = pandas.DataFrame({"image": images, "other": images[::-1]})
numpy.savez(
    sys.argv[2],
    embedding=model.predict(table[["image"]]),
    patch_mean=model.predict(table[["image"]], params={"pooling": "patch_mean"}),
    energy=model.predict(table, params={"output": "energy"}),
)
print(json.dumps(sorted(one.metadata["Name"].lower() for one in importlib.metadata.distributions())))
"""


@pytest.mark.long
def test_a_version_gives_the_same_numbers_in_a_fresh_environment_of_its_requirements(
    there: Path, tmp_path: Path, loaded: Any
) -> None:
    """What pip installs by the version's requirements.txt and nothing else; several GB."""
    contents = trained.pictures(6)
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    (requirements,) = there.glob("mlruns/**/requirements.txt")
    with tempfile.TemporaryDirectory() as place:  # pytest would keep it
        python = Path(place) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        run = subprocess.run(
            [python, "-c", _ELSEWHERE, f"sqlite:///{there}/mlflow.db", "found.npz", *map(str, range(len(contents)))],
            capture_output=True, text=True, cwd=tmp_path,
            env={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    installed = set(json.loads(run.stdout.splitlines()[-1]))
    assert {"torch", "mlflow"} <= installed
    assert not installed & {"darkmatter-ssl", "ray", "dvc", "timm", "torchvision", "onnxruntime", "scikit-image"}
    found = np.load(tmp_path / "found.npz")
    pairs = pandas.DataFrame({"image": contents, "other": contents[::-1]})
    for name, wanted in {
        "embedding": loaded.predict(pairs[["image"]]),
        "patch_mean": loaded.predict(pairs[["image"]], params={"pooling": "patch_mean"}),
        "energy": loaded.predict(pairs, params={"output": "energy"}),
    }.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_version_holds_what_it_promises_and_no_pickle(there: Path, tmp_path: Path) -> None:
    registry.fetch(CHAMPION, tmp_path / "version")
    inside = tmp_path / "version" / "artifacts" / "version"
    found = {path.relative_to(inside).as_posix() for path in inside.rglob("*") if path.is_file()}
    assert found == {
        "MODEL_CARD.md", "images.py", "programs.json", "embedding.pt2", "embedding.onnx", "energy.pt2",
        "model/config.json", "model/backbone.safetensors", "model/objective.safetensors",
        "hub/config.json", "hub/model.safetensors", "hub/network.py", "hub/README.md",
        "records/lineage.json", "records/params.yaml", "records/dvc.lock", "records/requirements.lock",
        "records/note.txt", "records/ingest.json", "records/report.html",
    }  # fmt: skip
    outside = {path.name for path in (tmp_path / "version").iterdir()}
    assert outside == {
        "MLmodel", "SHA256SUMS", "_embedder.py", "artifacts", "conda.yaml", "python_env.yaml", "requirements.txt"
    }  # fmt: skip
    assert (inside / "records/report.html").read_text() == (
        "<p>version of run 0000000000000000: ['candidate', 'champion']</p>"
    )
    reopened, _, _ = model.load(inside / "model")
    assert reopened.backbone.num_features == 32
    assert str(Path(package.__file__).parent) not in (tmp_path / "version" / "MLmodel").read_text()


def test_a_version_says_where_it_comes_from(there: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("test-backbone", "champion")
    assert version.tags["training_data"] == "d" * 64
    assert version.tags["seed"] == "0"
    for name in ("weights_sha256", "seal_sha256", "dvc_lock", "requirements_lock"):
        assert len(version.tags[name]) == 64
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert (version.tags["git_commit"], version.tags["git_dirty"], version.tags["signed"]) == (head, "no", "no")
    for text in (
        "90.0 ± 1.0 %", "d" * 64, "simclr", head, "## How not to use it\n\nCheques.", "## Intended use\n\nSearch of digits.",
        "## Licence\n\nApache-2.0", "Scanned digits.", "seed 0", "embedding.onnx", "(RankMe): 20.0 of 32",
    ):  # fmt: skip
        assert text in version.description
    run = client.get_run(version.run_id)
    assert run.data.params["pretrain.epochs"] == "3"
    assert run.data.metrics["few_shot/5-way 5-shot/pretrained"] == 0.9
    losses = client.get_metric_history(version.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(10, 3.0), (20, 2.0)]
    kept = {file.path for file in client.list_artifacts(version.run_id)}
    assert kept >= {"MODEL_CARD.md", "note.txt", "dvc.lock", "lineage.json"}


def test_addresses_of_the_place_which_may_hold_a_password_are_kept_nowhere(there: Path) -> None:
    for path in there.glob("mlruns/**/*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    assert b"me:secret" not in (there / "mlflow.db").read_bytes()


def test_the_hub_folder_is_the_network(there: Path) -> None:
    (folder,) = (path.parent for path in there.glob("mlruns/**/hub/config.json"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_features"], config["model_args"]) == (
        "small_conv", 32, {"in_chans": 1, "img_size": 28, "width": 4},
    )  # fmt: skip
    objective, _, _ = model.load(there / "model")
    weights = load_file(folder / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        name: tuple(value.shape) for name, value in objective.backbone.network.state_dict().items()
    }
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_pairs_go_one_by_one_where_the_program_takes_one_and_none_where_there_is_no_program(
    there: Path, tmp_path: Path, loaded: Any
) -> None:
    import mlflow

    x, y = trained.pictures(3), trained.pictures(3)[::-1]
    pairs, params = pandas.DataFrame({"image": x, "other": y}), {"output": "energy"}
    (stored,) = (path.parent for path in there.glob("mlruns/**/MLmodel"))

    def changed(**about: Any) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(stored, folder)
        shutil.copyfile(tmp_path / "energy.pt2", folder / "artifacts/version/energy.pt2")
        path = folder / "artifacts/version/programs.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **about}))
        return mlflow.pyfunc.load_model(str(folder))

    objective, _, _ = model.load(there / "model")
    picture = torch.zeros(1, 1, 28, 28)
    program = export._export(export.Energy(objective), [picture, picture.clone()], any_batch=False)
    torch.export.save(program, tmp_path / "energy.pt2")

    one_by_one = changed(pairs_at_once=1).predict(pairs, params=params)
    np.testing.assert_allclose(one_by_one, loaded.predict(pairs, params=params), rtol=1e-5)
    with pytest.raises(ValueError, match="this version has no energy: it cannot be written"):
        changed(energy=False, no_energy="it cannot be written").predict(pairs, params=params)


# --- a version that was tampered with


def flip(folder: Path) -> None:
    path = folder / "artifacts/version/embedding.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add(folder: Path) -> None:
    (folder / "artifacts/version/sitecustomize.py").write_text("")


def remove(folder: Path) -> None:
    (folder / "artifacts/version/MODEL_CARD.md").unlink()


def rewrite(folder: Path) -> None:
    flip(folder)
    seal.write(folder)


@pytest.mark.parametrize("tamper", [flip, add, remove, rewrite], ids=lambda one: one.__name__)
def test_a_version_that_was_tampered_with_in_the_store_does_not_load(
    tamper: Callable[[Path], None], there: Path, tmp_path: Path
) -> None:
    (stored,) = (path.parent for path in there.glob("mlruns/**/MLmodel"))
    shutil.copytree(stored, tmp_path / "before")
    champion = registry.champion("test-backbone")
    assert champion is not None
    try:
        tamper(stored)
        with pytest.raises(seal.Broken):
            registry.load(CHAMPION)
        with pytest.raises(seal.Broken):
            champion.open(torch.device("cpu"))
        with pytest.raises(seal.Broken):
            aliases.promote("test-backbone", "1", reason="")
        with pytest.raises(seal.Broken):
            registry.fetch(CHAMPION, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
        assert [change.action for change in aliases.history("test-backbone")] == ["register", "register"]
    finally:
        shutil.rmtree(stored)
        shutil.copytree(tmp_path / "before", stored)
    registry.load(CHAMPION)


def test_what_mlflow_leaves_in_a_store_of_this_machine_breaks_no_seal(there: Path) -> None:
    import mlflow

    mlflow.pyfunc.load_model(CHAMPION)
    assert list(there.glob("mlruns/**/registered_model_meta")), "MLflow leaves it no more; _remove_traces may go"
    registry.load(CHAMPION)


# --- six bad models


def nan_weights(store: Path) -> dict[str, Any]:
    path = store / "model" / "backbone.safetensors"
    weights = load_file(path)
    weights["network.layers.1.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path)
    return register(store / "model")


def collapsed(store: Path) -> dict[str, Any]:
    scores = trained.scores_of(store / "model")
    scores["energy_margin"]["auroc"]["pretrained"]["mean"] = 0.5
    return register(store / "model", scores)


def below_baseline(store: Path) -> dict[str, Any]:
    scores = trained.scores_of(store / "model")
    scores["few_shot"]["5-way 5-shot"]["advantage"]["pixels"] = {"mean": -0.02, "ci95": 0.01}
    return register(store / "model", scores)


def no_card(store: Path) -> dict[str, Any]:
    empty = trained.CARD.model_copy(update=dict.fromkeys(trained.CARD.model_dump(), ""))
    return register(store / "model", config=trained.CONFIG.model_copy(update={"card": empty}))


def dirty_tree(store: Path) -> dict[str, Any]:
    (store / "params.yaml").write_text("changed")
    return register(store / "model")


def tampered(store: Path) -> dict[str, Any]:
    scores = trained.scores_of(store / "model")
    path = store / "model" / "backbone.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return register(store / "model", scores)


@pytest.mark.parametrize(
    ("bad", "rule", "words"),
    [
        (nan_weights, "finite weights", "network.layers.1.0.weight is not finite"),
        (collapsed, "not collapsed", "energy margin 0.5000 < 0.9"),
        (below_baseline, "better than pixels", "difference -2.00% ± 1.00%"),
        (no_card, "card complete", "register.card.intended_use"),
        (dirty_tree, "committed", "not those of the commit: params.yaml; git add and git commit"),
        (tampered, "as evaluated", "this one was changed since"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_bad_model_is_refused_with_its_reason_and_leaves_no_trace(
    bad: Callable[[Path], dict[str, Any]], rule: str, words: str, store: Path
) -> None:
    import mlflow

    trained.save(store / "model")
    decision = bad(store)
    assert (decision["version"], decision["alias"], decision["new"]) == (None, [], False)
    reasons = broken(decision)
    assert list(reasons) == [rule]
    assert words in reasons[rule]
    assert mlflow.MlflowClient().search_registered_models() == []
    assert registry.champion("test-backbone") is None


def test_a_program_that_is_not_the_network_is_refused_after_it_was_made(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save(store / "model")
    decision = register(store / "model", config=trained.CONFIG.model_copy(update={"max_program_difference": 1e-12}))
    assert decision["version"] is None
    assert list(broken(decision)) == ["programs agree"]
    assert "embedding.onnx" in broken(decision)["programs agree"]


# --- what stays and what moves


def test_a_dirty_tree_that_was_allowed_is_recorded_in_the_version_and_on_its_card(store: Path) -> None:
    import mlflow

    trained.save(store / "model")
    (store / "components").mkdir()
    (store / "components" / "new.py").write_text("")
    decision = register(store / "model", config=trained.CONFIG.model_copy(update={"allow_dirty": True}))
    assert decision["version"] == "1"
    version = mlflow.MlflowClient().get_model_version("test-backbone", "1")
    assert version.tags["git_dirty"] == "components/new.py"
    assert "files of code and params that differ from it: components/new.py" in version.description


def test_versions_are_one_a_weight_and_champion_is_the_better(store: Path) -> None:
    import mlflow

    for seed in range(3):
        trained.save(store / f"model{seed}", seed=seed)
    assert register(store / "model0")["alias"] == ["candidate", "champion"]

    again = register(store / "model0")
    assert (again["version"], again["new"], again["alias"]) == ("1", False, ["candidate", "champion"])
    assert len(mlflow.MlflowClient().search_model_versions("name='test-backbone'")) == 1

    def compared(number: int, difference: float) -> dict[str, Any]:
        return trained.scores_of(store / f"model{number}", trained.beside_champion("1", difference))

    worse = register(store / "model1", compared(1, -0.1))
    assert (worse["version"], worse["alias"]) == ("2", ["candidate"])
    champion = registry.champion("test-backbone")
    assert champion is not None
    assert champion.version == "1"
    better = register(store / "model2", compared(2, 0.1))
    assert (better["version"], better["alias"]) == ("3", ["candidate", "champion"])
    moves = [(one.action, one.alias, one.before, one.after) for one in aliases.history("test-backbone")]
    assert moves == [
        ("register", "candidate", None, "1"),
        ("register", "champion", None, "1"),
        ("register", "candidate", "1", "2"),
        ("register", "candidate", "2", "3"),
        ("register", "champion", "1", "3"),
    ]
    assert "+10.00% ± 1.00%" in aliases.history("test-backbone")[-1].reason


def test_a_version_can_be_signed(store: Path, tmp_path: Path) -> None:
    import test_seal

    private, public = test_seal.keys(tmp_path, "ours")
    _, stranger = test_seal.keys(tmp_path, "stranger")
    trained.save(store / "model")
    register(store / "model", signing_key=private)
    registry.load(CHAMPION, public_key=public)
    with pytest.raises(seal.Broken, match="the signature does not fit"):
        registry.load(CHAMPION, public_key=stranger)


def test_a_champion_without_a_seal_is_passed_over_with_a_word(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    client.create_registered_model("test-backbone")
    client.create_model_version("test-backbone", str(store), tags={"weights_sha256": "w"})
    client.set_registered_model_alias("test-backbone", "champion", "1")
    assert registry.champion("test-backbone") is None
    assert "version 1 is champion but has no seal" in capsys.readouterr().err
    with pytest.raises(ValueError, match="version 1 has no seal"):
        registry.load(CHAMPION)


@pytest.mark.parametrize("uri", ["test-backbone", "models:/test-backbone", "models:/test-backbone/latest", "runs:/a/b"])
def test_an_address_that_names_no_version_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no version; write models:/NAME/3"):
        registry.fetch(uri, tmp_path / "copy")
