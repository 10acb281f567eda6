"""Rank correlations by hand, and over the checkpoints of a real short run on the digits."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "training"))
import runs

from darkmatter import cluster, health, images, model, rank_correlation, shards
from darkmatter.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
SECTION = {"seed": 0, "few_shot": {"ways": ["all"], "shots": [1], "episodes": 100, "queries": 5}}


def rows(**numbers: list[float]) -> list[rank_correlation.Row]:
    count = len(next(iter(numbers.values())))
    fixed = {name: [1.0] * count for name in rank_correlation.CLAIMS}
    table = {**fixed, "step": [10.0 * (1 + one) for one in range(count)], **numbers}
    return [{name: values[one] for name, values in table.items()} for one in range(count)]


def test_ranks_are_spearman_s_and_each_number_claims_what_its_paper_says() -> None:
    accuracy = [0.5, 0.6, 0.65, 0.8, 0.75, 0.7]
    found = rank_correlation.correlate(
        rows(
            **{
                "few-shot": accuracy,
                "energy margin": [0.5, 0.6, 0.61, 0.99, 0.98, 0.9],  # the same order
                "RankMe": [9, 8, 7, 1, 2, 3],  # the opposite
                "alpha-ReQ": [3, 0.2, 1.7, 1, 1.1, 0.5],  # nearer to 1 the better
                "alignment": [0.9, 0.8, 0.7, 0.1, 0.2, 0.3],  # small is good
                "uniformity": [-1, -2, -3, -9, -8, -7],
            }
        )
    )
    told = {one.number: one for one in found}
    assert list(told) == list(rank_correlation.CLAIMS)
    for number in ("energy margin", "alignment", "uniformity"):
        assert told[number].rho == pytest.approx(1)
        assert told[number].chosen == 0.8
    assert told["RankMe"].rho == pytest.approx(-1)
    assert told["RankMe"].chosen == 0.5
    # 1 - 6 sum d^2 / (n (n^2 - 1)), ranks by hand: the step's 1..6 beside the accuracy's 1 2 3 6 5 4
    assert told["step"].rho == pytest.approx(1 - 6 * (2**2 + 2**2) / (6 * 35))
    # |alpha - 1| = 2 .8 .7 0 .1 .5: ranks of its negative 1 2 3 6 5 4
    assert told["alpha-ReQ"].rho == pytest.approx(1)
    assert told["step"].chosen == 0.7
    assert 0 < told["step"].p < 0.25
    assert told["LiDAR"].rho is told["LiDAR"].p is None  # it never changes
    assert told["LiDAR"].chosen == 0.7  # the last of equals


def test_the_later_half_is_looked_at_by_itself() -> None:
    """A number that rises all the time follows accuracy as a whole, and is wrong where a choice is made."""
    accuracy = [0.1, 0.2, 0.3, 0.4, 0.5, 0.95, 0.9, 0.85, 0.8, 0.75]
    table = rows(**{"few-shot": accuracy, "RankMe": [float(one) for one in range(10)]})
    told = {one.number: one for one in rank_correlation.correlate(table)}["RankMe"]
    assert told.rho is not None
    assert told.rho > 0.6
    assert told.late == pytest.approx(-1)
    lines = rank_correlation.table(table)
    assert len(lines) == 2 + len(rank_correlation.CLAIMS) + 1
    assert f"| RankMe | {told.rho:+.2f} | {told.p:.1g} | -1.00 | 75.0 % |" in lines
    assert lines[-1] == "| *the best of 10 checkpoints* | | | | 95.0 % |"


@pytest.fixture(scope="module")
def project(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after `dvc repro`, with all checkpoints, whose shards of the test and the training split hold nothing."""
    folder = tmp_path_factory.mktemp("project")
    run = folder / "checkpoints" / "pretrain-0123"
    state = runs.run(digits / "train", run, "vicreg", keep=100)
    spec = runs.spec(digits / "train", "vicreg")
    model.save(folder / "models" / "backbone", state.objective, spec, {"seed": 0, "fingerprint": "0123"})
    shutil.copytree(digits / "shards", folder / "data" / "shards")
    for shard in shards.Manifest.load(digits / "shards").shards:
        if shard.split != "val":
            for path in (folder / "data" / "shards" / name for name in shard.files):
                path.write_bytes(bytes(path.stat().st_size))
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["evaluate"] = SECTION
    tree["register"]["protocol"] = "all-way 1-shot"
    tree["place"]["keep_checkpoints"] = 100
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_every_checkpoint_is_measured_on_the_validation_split_and_no_other_is_opened(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    rank_correlation.main(["--out", "found.json"])
    told = json.loads((project / "found.json").read_text())
    checkpoints = Checkpoints(str(project / "checkpoints" / "pretrain-0123"), keep=100)
    assert [row["step"] for row in told["checkpoints"]] == checkpoints.steps()
    assert len(checkpoints.steps()) > 10
    last = told["checkpoints"][-1]
    assert set(last) == {*rank_correlation.CLAIMS, "few-shot"}
    with shards.Reader(project / "data/shards", shards.Manifest.load(project / "data/shards"), "val") as reader:
        contents = [reader.read(number) for number in range(len(reader))]
    fitted = np.stack([images.fit(images.decode(one), size=28, channels=1) for one in contents])
    objective, _, _ = model.load(project / "models" / "backbone")
    embeddings = health.embeddings(objective, torch.from_numpy(fitted).float() / 255)
    assert last["RankMe"] == pytest.approx(health.rankme(embeddings), rel=1e-4)
    assert last["uniformity"] == pytest.approx(health.uniformity(embeddings), rel=1e-4)
    assert 0.1 < last["few-shot"] < 1
    assert last["energy margin"] > told["checkpoints"][0]["energy margin"]
    output = capsys.readouterr().out
    assert "all-way 1-shot on the validation split" in output
    assert f"the best of {len(checkpoints.steps())} checkpoints" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "5 way 5 shot"}, "'5 way 5 shot' is no protocol"),
        ({"protocol": "all-way 200-shot"}, "classes have 205 labelled test samples; raise ingest.val_fraction"),
        (
            {"checkpoints": Checkpoints("nowhere", keep=2)},
            "nowhere has 0 checkpoints, 5 are needed at least: set place",
        ),
    ],
    ids=["protocol", "few samples", "few checkpoints"],
)
def test_what_cannot_be_measured_is_said(project: Path, change: dict[str, Any], message: str) -> None:
    values = {
        "checkpoints": Checkpoints(str(project / "checkpoints" / "pretrain-0123"), keep=100),
        "model_folder": project / "models" / "backbone",
        "shards_folder": project / "data" / "shards",
        "protocol": "all-way 1-shot",
        "section": SECTION,
        "place": cluster.PlaceConfig(
            **{**yaml.safe_load((project / "params.yaml").read_text())["place"], "features": str(project / "features")}
        ),
    }
    with pytest.raises(ValueError, match=message):
        rank_correlation.measure(**{**values, **change})
