"""Each example as it is written: its file, in a process that can import only what its own requirements bring."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from conftest import free_port

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
NAME = "darkmatter-backbone"


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a version that was trained on the digits for some seconds, and folders of images."""
    sys.path += [str(ROOT / "tests" / "training"), str(ROOT / "tests" / "registry")]
    import runs
    import test_register
    import trained

    from darkmatter import model

    before, folder = Path.cwd(), tmp_path_factory.mktemp("examples")
    test_register.repository(folder)
    small = {"backbone": {"name": "small_conv", "small_conv": {"width": 16}}}
    small["objective"] = {"name": "simclr", "simclr": {"projector": [128, 32]}}
    spec = runs.spec(digits / "train", "simclr").model_copy(update=small)
    never = {"save_every": 10**6, "health_every": 10**6, "log_every": 10**6}
    training = runs.CONFIG.model_copy(update={"epochs": 20, "batch_size": 64, "learning_rate": 0.002, **never})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "spec", lambda *_: spec)
        state = runs.run(digits / "train", folder / "training", "simclr", config=training)
    model.save(folder / "model", state.objective.eval(), spec, trained.provenance(0))
    config = trained.CONFIG.model_copy(update={"model": NAME})
    assert test_register.register(folder / "model", config=config)["version"] == "1"
    os.chdir(before)
    shutil.copytree(digits / "files", folder / "digits")
    strange(folder / "strange")
    return folder


def strange(folder: Path) -> None:
    """Letters, as dense as the digits are."""
    folder.mkdir()
    for letter in "ABEGHKMNQRWXabekmw":
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), letter, 255, font=ImageFont.load_default(22), anchor="mm")
        image.save(folder / f"{ord(letter)}.png")


def environment(place: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_AUTH_MODE")}
    return {**clean, "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "PYTHONWARNINGS": "ignore"}


def example(name: str, *arguments: object, place: Path) -> subprocess.CompletedProcess[str]:
    """Runs it in the registry's folder; it must end well."""
    file = str(EXAMPLES / name)
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fresh.py"), file, file, *map(str, arguments)],
        capture_output=True, text=True, env=environment(place), cwd=place,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture
def module(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example, to call it in this process with arguments."""
    import mlflow

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(place)
    mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")

    def load(name: str, *arguments: object) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return importlib.import_module(name)

    return load


def message(load: Any, name: str, *arguments: object) -> str:
    """What the example ends with, when it is called with a mistake."""
    loaded = load(name, *arguments)
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        importlib.import_module("version").run(loaded.main)
    assert end.value.code == 2
    last = errors.getvalue().splitlines()[-1]
    assert last.startswith(f"{name}.py: "), errors.getvalue()
    return last


def some(place: Path, folder: Path, per_class: int, first: int = 0) -> Path:
    """A folder a class with so many digits each."""
    for one in sorted((place / "digits").iterdir()):
        (folder / one.name).mkdir(parents=True)
        for path in sorted(one.iterdir())[first : first + per_class]:
            shutil.copy(path, folder / one.name / path.name)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# --- few-shot


def test_few_shot_classifies_a_folder_from_five_labels_a_class(place: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    for path in some(place, tmp_path / "held", 3, first=40).glob("*/*.png"):
        shutil.copy(path, new / f"{path.parent.name}-{path.name}")
    (new / "broken.png").write_bytes(b"text")
    run = example("few_shot.py", some(place, tmp_path / "known", 25), new, "--out", tmp_path / "p.csv", place=place)
    accuracy, low, high, count = re.search(
        r"accuracy (\S+)% \(95%: (\S+)% to (\S+)%\) on the (\d+) labelled", run.stdout
    ).groups()  # type: ignore[union-attr]
    assert float(low) < float(accuracy) < float(high)
    assert (float(low), int(count)) > (50.0, 200 - 1), "ten classes, so that guessing gives 10"
    assert f"left out: {new / 'broken.png'}: not-an-image" in run.stderr
    rows = rows_of(tmp_path / "p.csv")
    assert len(rows) == 30
    right = [row["label"] == row["file"].partition("-")[0] for row in rows]
    assert np.mean(right) > 0.5
    assert all(0.1 < float(row["confidence"]) <= 1 for row in rows)


def test_few_shot_names_classes_that_have_too_few_images(place: Path, tmp_path: Path, module: Any) -> None:
    known = some(place, tmp_path / "known", 6)
    for name, left in (("3", 2), ("7", 4)):
        for path in sorted((known / name).iterdir())[left:]:
            path.unlink()
    said = message(module, "few_shot", known, place / "strange")
    assert "5 usable images of each class are needed, and 3 has 2, 7 has 4; add some, or say --shots 2" in said
    (known / "loose.png").write_bytes(b"")
    assert "1 images that are in no folder of a class" in message(module, "few_shot", known, place / "strange")


def test_centroids_and_logistic_regression_give_probabilities_and_their_constant_follows_the_data(module: Any) -> None:
    few_shot = module("few_shot")
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 10)
    for head in few_shot.HEADS:
        for noise, doubt in ((0.05, False), (5.0, True)):
            given = np.eye(2)[labels] + noise * random.normal(size=(20, 2))
            given /= np.linalg.norm(given, axis=1, keepdims=True)
            chances = few_shot.fit(head, given, labels, 10).predict_proba(given)
            np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
            assert (chances.max(1).mean() < 0.85) == doubt, (head, noise, chances.max(1).mean())


# --- search


def test_search_finds_the_image_itself_and_embeds_only_what_is_new(place: Path, tmp_path: Path) -> None:
    folder = some(place, tmp_path / "photos", 8)
    (folder / "broken.jpg").write_bytes(b"text")
    query = sorted((folder / "4").iterdir())[0]
    shared = (folder, query, "--index", tmp_path / "i.npz", "--sheet", tmp_path / "s.png", "--hits", 3)
    run = example("search.py", *shared, place=place)
    assert "80 images, 80 embedded now, 0 forgotten" in run.stdout
    hits = re.findall(r"^  (\d\.\d+)  (\S+)$", run.stdout, re.MULTILINE)
    assert hits[0] == ("1.000", f"4/{query.name}")
    assert len(hits) == 3
    assert "broken.jpg: not-an-image" in run.stderr
    with Image.open(tmp_path / "s.png") as picture:
        assert len(np.unique(picture)) > 20, "nothing was drawn"
    shutil.copy(place / "strange" / "65.png", folder / "new.png")
    gone, changed = sorted((folder / "0").iterdir())[:2]
    gone.unlink()
    shutil.copy(place / "strange" / "66.png", changed)
    again = example("search.py", folder, folder / "new.png", *shared[2:], place=place)
    assert "80 images, 2 embedded now, 2 forgotten" in again.stdout, "one new, one changed; one gone, one changed"
    hits = re.findall(r"^  (\d\.\d+)  (\S+)$", again.stdout, re.MULTILINE)
    assert hits[0] == ("1.000", "new.png")


def test_search_refuses_an_index_of_another_version_or_folder(place: Path, tmp_path: Path, module: Any) -> None:
    import mlflow

    from darkmatter.registry import seal

    folder, index = some(place, tmp_path / "photos", 1), tmp_path / "i.npz"
    query = next(folder.glob("*/*.png"))
    shared = ("--index", index, "--sheet", tmp_path / "s.png")
    module("search", folder, query, *shared).main()
    said = message(module, "search", place / "strange", query, *shared)
    assert f"is the index of {folder}, not of" in said
    stored = next(path.parent for path in place.glob("mlruns/**/MLmodel"))
    shutil.copytree(stored, tmp_path / "other", ignore=shutil.ignore_patterns("registered_model_meta"))
    (tmp_path / "other/artifacts/version/MODEL_CARD.md").write_text("of another version")
    client = mlflow.MlflowClient()
    client.create_model_version(NAME, str(tmp_path / "other"), tags={"seal_sha256": seal.write(tmp_path / "other")})
    try:
        said = message(module, "search", folder, query, *shared, "--model", f"models:/{NAME}/2")
        assert f"holds embeddings of {NAME} version 1, and this is {NAME} version 2: they cannot be compared" in said
        assert said.endswith(f"or search with --model models:/{NAME}/1")
    finally:
        client.delete_model_version(NAME, "2")
    index.write_bytes(b"text")
    assert "i.npz is no index of this program" in message(module, "search", folder, query, *shared)


# --- outliers


def test_outliers_have_a_higher_energy_than_good_images_and_are_listed_first(place: Path, tmp_path: Path) -> None:
    """A digit that is not among the good ones does not belong to them."""
    good, new = some(place, tmp_path / "good", 40), tmp_path / "new"
    new.mkdir()
    shutil.copytree(good / "0", tmp_path / "zeros")
    shutil.rmtree(good / "0")
    for path in some(place, tmp_path / "held", 3, first=42).glob("*/*.png"):
        shutil.copy(path, new / f"{path.parent.name}-{path.name}")
    run = example("outliers.py", good, new, "--bad", tmp_path / "zeros", place=place)
    values = {name: float(value) for name, value in re.findall(r"AUROC of the (\w+) +(\S+) \(95%", run.stdout)}
    assert values.keys() == {"energy", "distance"}
    assert values["energy"] > 0.8, run.stdout
    assert "energy less distance" in run.stdout
    rows = rows_of(place / "outliers.csv")
    assert len(rows) == 30
    assert [float(row["energy"]) for row in rows] == sorted((float(row["energy"]) for row in rows), reverse=True)
    listed = [row["file"][0] for row in rows if row["outlier"] == "yes"]
    assert "0" in listed
    # Of 27 good ones one or two are expected; more than six come once in a thousand.
    assert sum(one != "0" for one in listed) <= 6
    assert (place / "outliers.png").stat().st_size > 5000


def test_outliers_asks_for_enough_good_images_and_for_an_energy(
    place: Path, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = some(place, tmp_path / "few", 3)
    said = message(module, "outliers", few, place / "strange")
    assert "has 30 usable images; with --false-alarms 0.05 it takes 40" in said
    outliers = module("outliers")

    class Without:
        def predict(self, *_: object, **__: object) -> None:
            raise ValueError("this version has no energy: torch.export cannot write it")

    bare = importlib.import_module("version").Version(NAME, "1", "", place, Without())
    one = next((place / "strange").iterdir())
    with pytest.raises(importlib.import_module("version").Stop, match="has no energy: torch"):
        outliers.score(bare, np.ones((1, 2)), [one], np.ones((1, 2)), [one])


def test_the_auroc_of_scores_that_are_apart_is_one_and_differences_are_paired(module: Any) -> None:
    outliers = module("outliers")
    inside, outside = np.arange(50.0), np.arange(100.0, 130.0)
    assert outliers.auroc(inside, outside)[0] == 1
    value, drawn = outliers.auroc(inside, outside - 80)
    _, same = outliers.auroc(2 * inside, 2 * (outside - 80))
    assert 0 < value < 1
    np.testing.assert_array_equal(drawn, same)


# --- fine-tuning


def test_fine_tuning_stands_beside_training_from_nothing_and_timm_loads_what_it_wrote(
    place: Path, tmp_path: Path
) -> None:
    known = some(place, tmp_path / "known", 20)
    run = example(
        "fine_tune.py", known, "--draws", 3, "--steps", 40, "--out", tmp_path / "tuned", place=place
    )  # fmt: skip
    means = {
        name: float(value) for name, value in re.findall(r"^  ([a-z -]+?)  +(\S+) ± \S+ %$", run.stdout, re.MULTILINE)
    }
    assert {"fine-tuned", "last layer only", "from nothing"} <= means.keys(), run.stdout
    assert means["fine-tuned"] > means["from nothing"]
    code = (
        "import sys; sys.path.append(sys.argv[1]); import network, timm, torch\n"
        "model = timm.create_model(f'local-dir:{sys.argv[1]}', pretrained=True).eval()\n"
        "print(model(torch.rand(2, 1, 28, 28)).shape)"
    )
    loaded = subprocess.run([sys.executable, "-c", code, str(tmp_path / "tuned")], capture_output=True, text=True)
    assert loaded.stdout == "torch.Size([2, 10])\n", loaded.stderr
    assert json.loads((tmp_path / "tuned/config.json").read_text())["label_names"] == [str(one) for one in range(10)]


def test_fine_tuning_wants_images_to_measure_with(place: Path, tmp_path: Path, module: Any) -> None:
    said = message(module, "fine_tune", some(place, tmp_path / "known", 5))
    assert "0 has 5, 1 has 5" in said
    assert said.endswith("say --shots 4")


# --- parquet


def tables(folder: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return {path.stem: pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))}


def test_a_killed_embedding_job_goes_on_and_leaves_finished_parts_as_they_are(
    place: Path, tmp_path: Path, module: Any
) -> None:
    import tarfile

    import pyarrow.parquet as pq

    photos, out = some(place, tmp_path / "photos", 12), tmp_path / "out"
    (photos / "broken.png").write_bytes(b"text")
    with tarfile.open(photos / "more.tar", "w") as tar:
        for path in sorted((place / "strange").iterdir())[:4]:
            tar.add(path, path.name)
    command = [
        sys.executable,
        str(EXAMPLES / "embed_folder.py"),
        str(photos),
        str(out),
        "--part",
        "10",
        "--workers",
        "1",
    ]
    job = subprocess.Popen(command, env=environment(place), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(out.glob("part-*.parquet"))) < 2:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.kill()
    job.wait()
    time.sleep(1)  # what the worker had begun
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 2 <= len(before) < 14, "it was over before it was killed"
    run = example("embed_folder.py", photos, out, "--part", "10", "--workers", "1", place=place)
    assert "124 images in 14 parts" in run.stdout
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())
    found = tables(out)
    keys = [key for table in found.values() for key in table["key"].to_pylist()]
    expected = {path.relative_to(photos).as_posix() for path in photos.glob("*/*.png")}
    assert len(keys) == len(set(keys))
    assert set(keys) == expected | {f"more.tar/{path.name}" for path in sorted((place / "strange").iterdir())[:4]}
    assert pq.read_table(out).num_rows == 124, "the folder as a whole can be read, as the page says"
    rejects = rows_of(out / "_rejects.csv")
    assert [row["key"] for row in rejects] == ["broken.png"]
    assert rejects[0]["reason"].startswith("not-an-image")

    opened = importlib.import_module("version").open_version(f"models:/{NAME}@champion")
    for table in found.values():
        about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        assert (about["model"], about["version"], about["seal"]) == (NAME, "1", opened.seal)
    table = next(iter(found.values()))
    key = table["key"][0].as_py()
    content = (place / "strange" / key.partition("/")[2] if key.startswith("more.tar") else photos / key).read_bytes()
    np.testing.assert_allclose(
        np.array(table["embedding"][0].as_py(), np.float32), opened.embed([content])[0], atol=1e-5
    )

    said = message(module, "embed_folder", photos, out, "--normalize")
    assert "holds embeddings with params" in said
    assert said.endswith("name another folder")


# --- one that was there before


def test_embed_compares_images(place: Path) -> None:
    first, second = sorted((place / "digits" / "0").iterdir())[:2]
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "embed.py"), str(first), str(second)],
        capture_output=True, text=True, env=environment(place), cwd=place,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert re.match(rf"{re.escape(str(first))}  1\.000 ", run.stdout)


# --- mistakes that all of them share


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (f"models:/{NAME}@chmpion", "chmpion not found"),
        (f"models:/{NAME}/9", "(name=darkmatter-backbone, version=9) not found"),
        ("models:/other@champion", "Registered Model with name=other not found"),
        (NAME, "names no version; write models:/NAME/3 or models:/NAME@champion"),
    ],
)
def test_a_version_that_is_not_there_is_named(model: str, words: str, place: Path, module: Any) -> None:
    assert words in message(module, "few_shot", place / "digits", place / "strange", "--model", model)


def test_a_registry_that_is_away_is_named(
    place: Path, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    arguments = ("few_shot", place / "digits", place / "strange")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    assert "there is no registry at mlflow.db; set MLFLOW_TRACKING_URI" in message(module, *arguments)
    assert list(tmp_path.iterdir()) == [], "MLflow made an empty one"
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(address)
    assert f"in the registry {address}: " in message(module, *arguments)


@pytest.mark.parametrize("name", ["few_shot", "outliers", "search"])
def test_a_folder_without_images_is_named_before_a_model_is_loaded(name: str, module: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    query = tmp_path / "notes.txt"
    assert f"{tmp_path} holds no image (.bmp, " in message(module, name, tmp_path, query, "--model", "unheard of")
    assert "there is no folder" in message(module, name, tmp_path / "none", query, "--model", "unheard of")


@pytest.mark.parametrize("name", ["fine_tune", "embed_folder"])
def test_the_others_name_it_too(name: str, module: Any, tmp_path: Path) -> None:
    out = [tmp_path / "out"] if name == "embed_folder" else []
    assert f"{tmp_path} holds no image (.bmp, " in message(module, name, tmp_path, *out, "--model", "unheard of")


def test_a_version_that_was_tampered_with_is_not_opened(place: Path, module: Any) -> None:
    stored = next(path.parent for path in place.glob("mlruns/**/MLmodel"))
    card = stored / "artifacts/version/MODEL_CARD.md"
    text, added = card.read_text(), stored / "artifacts/version/sitecustomize.py"
    arguments = ("few_shot", place / "digits", place / "strange")
    try:
        card.write_text(text + " ")
        assert "is not what was registered (artifacts/version/MODEL_CARD.md)" in message(module, *arguments)
        card.write_text(text)
        added.write_text("")
        assert "is not what was registered (artifacts/version/sitecustomize.py)" in message(module, *arguments)
    finally:
        card.write_text(text)
        added.unlink(missing_ok=True)


# --- serving


@pytest.fixture(scope="module")
def page(place: Path) -> Iterator[list[str]]:
    """The commands of serve.md, the server being the first, which runs; with another port."""
    port = free_port()
    text = (EXAMPLES / "serve.md").read_text().replace("5001", str(port))
    blocks = [
        re.sub(r"^    ", "", one, flags=re.MULTILINE) for one in re.findall(r"(?:^(?:    .*)?\n)+", text, re.MULTILINE)
    ]
    commands = [one.strip("\n") for one in blocks if one.strip()]
    for name, source in zip("ab", sorted((place / "digits" / "5").iterdir()), strict=False):
        shutil.copy(source, place / f"{name}.png")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (place / "server.log").open("w")
    server = subprocess.Popen(
        ["bash", "-c", f"exec {commands[0]}"], cwd=place, env={**environment(place), "PATH": path},
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").close()
                break
            assert server.poll() is None and time.monotonic() < deadline, (place / "server.log").read_text()
            time.sleep(0.2)
        yield [str(port), *commands[1:]]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait()
        log.close()


def test_the_page_about_serving_gives_what_the_model_gives_in_process(
    page: list[str], place: Path, module: Any
) -> None:
    _, embedding, energy, script = page
    opened = module("version").open_version(f"models:/{NAME}@champion")

    def curl(command: str) -> Any:
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=place)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)["predictions"]

    first, second = ((place / f"{name}.png").read_bytes() for name in "ab")
    expected = opened.embed([first], normalize=True)[0]
    np.testing.assert_allclose(np.array(curl(embedding), np.float32), [expected], atol=1e-5)
    import pandas

    pairs = pandas.DataFrame({"image": [first, first], "other": [second, first]})
    energies = opened.model.predict(pairs, params={"output": "energy"})
    np.testing.assert_allclose(curl(energy), energies[:1], rtol=1e-4)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=place)
    assert run.returncode == 0, run.stderr
    count, both = run.stdout.splitlines()
    assert count == "2 embeddings"
    np.testing.assert_allclose(json.loads(both), energies, rtol=1e-4)


def test_a_server_names_the_row_that_is_no_image_and_goes_on(page: list[str]) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{page[0]}/invocations",
        json.dumps({"dataframe_records": [{"image": "dGV4dA=="}]}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(request)
    assert answer.value.code == 400
    assert b"row 0 is no usable image" in answer.value.read()
    answer.value.close()
    assert urllib.request.urlopen(f"http://127.0.0.1:{page[0]}/ping").status == 200
