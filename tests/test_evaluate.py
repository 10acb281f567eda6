"""The stage on real digits with a short real training."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "training"))
import runs

from darkmatter import evaluate, gallery, model, params, pictures, registry, report, shards
from darkmatter.registry import gate
from test_features import FromFiles

ROOT = Path(__file__).parent.parent
SECTION = {
    "seed": 0,
    "beside": [],
    "few_shot": {"ways": [5], "shots": [1, 5, 500], "episodes": 200, "queries": 5},
    "knn": {"neighbours": 5, "temperature": 0.07},
    "rankme": {},
    "energy_margin": {},
    "robustness": {"corruptions": ["noise"], "severity": 5, "ways": 5, "shots": 5, "episodes": 200, "queries": 5},
    "localisation": {},
}


@pytest.fixture(scope="module")
def model_folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    longer = runs.CONFIG.model_copy(update={"epochs": 20, "log_every": 50, "save_every": 100, "health_every": 100})
    state = runs.run(digits / "train", folder / "run", "vicreg", config=longer)
    model.save(folder / "model", state.objective, runs.spec(digits / "train", "vicreg"), {"seed": 0})
    return folder / "model"


@pytest.fixture(scope="module")
def results(digits: Path, model_folder: Path) -> evaluate.Results:
    champion = dataclasses.replace(FromFiles(), name="champion")
    place = runs.place(model_folder.parent)
    return evaluate.evaluate(model_folder, digits / "shards", SECTION, champion=champion, place=place)


def measured(results: evaluate.Results) -> list[dict]:
    return [row for row in results.tree["few_shot"].values() if "skipped" not in row]


def test_every_subject_is_scored_on_every_protocol(results: evaluate.Results, digits: Path) -> None:
    manifest = shards.Manifest.load(digits / "shards")
    assert results.tree["test_samples"] == results.tree["labelled"] == manifest.samples("test")
    assert list(results.tree["few_shot"]) == ["5-way 1-shot", "5-way 5-shot", "5-way 500-shot"]
    assert results.tree["few_shot"]["5-way 500-shot"] == {"skipped": "0 classes have 505 labelled test samples"}
    for row in measured(results):
        assert set(row) == {"pretrained", "untrained", "pixels", "histogram", "champion", "advantage"}
        assert set(row["advantage"]) == {"untrained", "pixels", "histogram", "champion"}
    assert set(results.tree["energy_margin"]["auroc"]) == {"pretrained", "untrained"}


def test_pretraining_helps(results: evaluate.Results) -> None:
    row = results.tree["few_shot"]["5-way 5-shot"]
    gap = row["advantage"]["untrained"]
    assert gap["mean"] > gap["ci95"] > 0
    margin = results.tree["energy_margin"]["auroc"]
    assert margin["pretrained"]["mean"] > margin["untrained"]["mean"]
    compatible, incompatible = results.energies
    assert compatible.mean() < incompatible.mean()


def test_noise_takes_what_clean_pictures_gave(results: evaluate.Results) -> None:
    clean, noisy = results.tree["few_shot"]["5-way 5-shot"], results.tree["robustness"]["5-way 5-shot noise 5"]
    assert noisy["pretrained"]["mean"] < clean["pretrained"]["mean"] - noisy["pretrained"]["ci95"]
    assert set(results.tree["localisation"]["segmentation"]) == {"pretrained", "untrained", "advantage"}
    assert results.tree["localisation"]["position"]["pretrained"]["mean"] > 0.3


def test_differences_are_paired(results: evaluate.Results) -> None:
    """The champion here is raw pixels by another way: the same episodes, so no difference at all between the two."""
    for row in measured(results):
        assert row["champion"] == row["pixels"]
        assert row["advantage"]["champion"] == row["advantage"]["pixels"]
        separate = np.hypot(row["pretrained"]["ci95"], row["pixels"]["ci95"])
        assert row["advantage"]["pixels"]["ci95"] < separate


def test_without_labels_what_needs_them_is_named_and_the_rest_is_measured(
    digits: Path, model_folder: Path, tmp_path: Path
) -> None:
    labelled = shards.Manifest.load(digits / "shards")
    parts = []
    for shard in labelled.shards:
        samples = [dataclasses.replace(one, label=None) for one in shards.read_shard(digits / "shards", shard)]
        parts.append(shards.write_shard(tmp_path / shard.path, samples, split=shard.split))
    shards.Manifest(classes=None, shards=parts).save(tmp_path)
    results = evaluate.evaluate(model_folder, tmp_path, SECTION, champion=None, place=runs.place(tmp_path))
    assert results.tree["labelled"] == 0
    assert all("skipped" in row for row in results.tree["few_shot"].values())
    assert results.tree["knn"] == {"top-1 k=5": {"skipped": "there are no labels"}}
    assert results.tree["energy_margin"]["auroc"]["pretrained"]["mean"] > 0.6
    assert results.tree["rankme"]["rankme"]["pretrained"]["mean"] > 1
    pictures.few_shot(results.tree, tmp_path / "few_shot.png")
    config = params.parse(registry.RegisterConfig, params.read(ROOT / "params.yaml")["register"], where="register")
    candidate = gate.Candidate(
        folder=model_folder, provenance={}, scores=results.tree, commit=None, uncommitted=[], records=[], source="",
        ingested={},
    )  # fmt: skip
    rules = gate.to_register(candidate, config.model_copy(update={"min_energy_margin": 0.6, "min_rankme": 1.0}))
    assert {rule.name for rule in rules if not rule.passed} == {"lineage complete", "card complete"}


def test_a_page_is_made_of_it(results: evaluate.Results, tmp_path: Path) -> None:
    page = make_page(results, tmp_path)
    html, text = page.html(), page.text()
    assert html.count("data:image/png;base64,") == 7
    assert "http" not in html.replace("http-equiv", "")
    assert "Refused: the model is not not collapsed" not in html
    assert "&lt;more&gt;" in html
    assert "Goodput 75.0% of 12 s" in html
    assert "start 20.0%, recovery 5.0%." in html
    for words in ("5-way 5-shot", "pretrained", "champion", "pixels", "FAIL  not collapsed", "not measured: 0 classes"):
        assert words in text
    assert "Refused" in page.verdict()


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(results: evaluate.Results, tmp_path: Path, width: int) -> None:
    """What is seen: every picture is drawn, and nothing but tables is wider than a phone."""
    measure = (
        "document.title = JSON.stringify({wide: document.documentElement.scrollWidth, high: document.body.scrollHeight, \
drawn: [...document.images].map(i => i.naturalWidth), text: document.body.innerText.length})"
    )
    html = make_page(results, tmp_path).html() + f"<script>{measure}</script>"
    (tmp_path / "page.html").write_text(html)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}/profile",
        "--hide-scrollbars", f"--window-size={width},2000", f"--screenshot={tmp_path}/page.png", "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", told)[1])
    assert seen["wide"] <= max(width, 500)  # headless Chromium has no window under 500
    assert seen["high"] > 2000
    assert len(seen["drawn"]) == 7
    assert min(seen["drawn"]) > 100
    assert seen["text"] > 1500
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 200


def make_page(results: evaluate.Results, tmp_path: Path) -> report.Page:
    plots = tmp_path / "plots"
    pictures.few_shot(results.tree, plots / "few_shot.png")
    pictures.energies(*results.energies, plots / "energies.png")
    pictures.history([{"step": 1, "loss": 2.0, "energy_margin": 0.5, "learning_rate": 0.1}], plots / "history.png")
    gallery.draw(results.extraction, results.network, results.subject, plots)
    pictures.contact_sheet([np.zeros((9, 7, 1), np.uint8)], np.zeros((1, 2, 1, 8, 8)), plots / "views.png")
    rule = {"passed": False, "reason": "energy margin 0.5 < 0.9 & <more>"}
    return report.Page(
        metrics={
            "evaluate": results.tree,
            "ingest": {
                "files_seen": 9, "samples": 5, "duplicates": 1, "rejects": 3, "rejects_by_reason": {"empty": 3},
                "samples_by_split": {"train": 5},
            },
            "augment": {},
            "pretrain": {
                "steps": 10, "images": 100, "images_per_second": 5.0, "fingerprint": "f" * 16,
                "goodput": 0.75, "wall_seconds": 12.0, "lost_to": {"start": 0.2, "recovery": 0.05},
            },
        },
        decision={"version": None, "alias": [], "new": False, "rules": {"not collapsed": rule}},
        params=params.read(Path(__file__).parent.parent / "params.yaml"),
        plots=plots,
    )  # fmt: skip
