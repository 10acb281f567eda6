"""The whole pipeline in a repository of its own: real DVC, Git, Ray and MLflow, the digits, a short training."""

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from conftest import copy_repository
from darkmatter import files, model
from darkmatter.registry import register, reproduce
from darkmatter.training.history import read as read_history
from servers import CLEAN

ROOT = Path(__file__).parent.parent.parent


class Repository:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(command, cwd=self.folder, env=CLEAN, capture_output=True, text=True)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def metrics(self, stage: str) -> dict:
        return json.loads((self.folder / "metrics" / f"{stage}.json").read_text())

    def change(self, **sections: dict) -> None:
        path = self.folder / "params.yaml"
        tree = yaml.safe_load(path.read_text())
        for name, change in sections.items():
            tree[name] = {**tree[name], **change}
        path.write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A copy of this repository's files as they are, committed, with params for a training of seconds."""
    folder = tmp_path_factory.mktemp("pipeline") / "repository"
    copy_repository(folder)
    made = Repository(folder)
    made.change(
        backbone={"small_conv": {"width": 8}},
        pretrain={"epochs": 6, "warmup_epochs": 1, "log_every": 1, "save_every": 10, "health_every": 62},
        evaluate={"few_shot": {"ways": [5], "shots": [5], "episodes": 100, "queries": 15}},
        register={"min_energy_margin": 0.8},
    )
    for command in ("git init -q", "git config user.name n", "git config user.email e@example.org"):
        made.run(*command.split())
    made.run("git", "add", "-A")
    made.run("git", "commit", "-qm", "start")
    return made


def test_a_typo_is_refused_at_once_with_the_list_of_what_exists(repository: Repository) -> None:
    right = (repository.folder / "params.yaml").read_text()
    for wrong, message in (
        (
            right.replace("name: simclr", "name: simcrl"),
            r"objective\.name: there is no 'simcrl'.*Did you mean 'simclr'.*There is: .*simclr, .*vicreg",
        ),
        (right.replace("\npretrain:", "\npretrian:"), r"section 'pretrian' is unknown. Did you mean 'pretrain'"),
    ):
        (repository.folder / "params.yaml").write_text(wrong)
        output = repository.run("dvc", "repro", fails=True)
        assert re.search(message, output), output
        assert "Running stage 'ingest'" not in output
        assert "Traceback" not in output
    (repository.folder / "params.yaml").write_text(right)
    repository.run("git", "checkout", "-q", "params.yaml")


def test_killed_in_the_middle_of_pretraining_it_goes_on(repository: Repository) -> None:
    """SIGKILL to the whole process group of `dvc repro`."""
    with (repository.folder.parent / "log").open("w") as log:
        process = subprocess.Popen(
            ["dvc", "repro"], cwd=repository.folder, env=CLEAN, stdout=log, stderr=log, start_new_session=True
        )
        reached = 0
        while process.poll() is None and reached < 35:
            folders = list((repository.folder / "checkpoints").glob("pretrain-*"))
            rows = read_history(str(folders[0])) if folders else []
            reached = int(rows[-1]["step"]) if rows else 0
            time.sleep(0.05)
        assert process.poll() is None, (repository.folder.parent / "log").read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (repository.folder / "models").exists()

    output = repository.run("dvc", "repro")
    resumed = re.search(r"going on from step (\d+)", output)
    assert resumed, output
    assert reached - 10 <= int(resumed[1]) <= reached + 10
    steps = repository.metrics("pretrain")["steps"]
    history = (repository.folder / "plots" / "history.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[0]) for row in history] == list(range(1, steps + 1))


def test_the_run_left_what_it_promises(repository: Repository) -> None:
    counts = repository.metrics("ingest")
    assert counts["files_seen"] == counts["samples"] + counts["duplicates"] + counts["rejects"] == 5000
    scores = repository.metrics("evaluate")
    row = scores["few_shot"]["5-way 5-shot"]
    assert row["pretrained"]["mean"] - row["pretrained"]["ci95"] > row["untrained"]["mean"] + row["untrained"]["ci95"]
    assert scores["energy_margin"]["auroc"]["pretrained"]["mean"] > 0.85
    decision = repository.metrics("register")
    assert (decision["version"], decision["alias"]) == ("1", ["candidate", "champion"])
    for name in (
        "report.html",
        "plots/views.png",
        "plots/few_shot.png",
        "plots/energies.png",
        "data/shards/rejects.jsonl",
    ):
        assert (repository.folder / name).is_file()
    page = (repository.folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "python -m darkmatter.registry reproduce 1" in page


def test_the_git_tree_is_clean_but_for_lock_and_metrics(repository: Repository) -> None:
    changed = repository.run("git", "status", "--porcelain").split("\n")
    assert {line[3:].split("/")[0] for line in changed if line} <= {"dvc.lock", "metrics"}


def test_a_second_repro_does_nothing(repository: Repository) -> None:
    output = repository.run("dvc", "repro")
    ran = re.findall(r"Running stage '(\w+)'", output)
    assert ran == ["discover"]
    for stage in ("check", "ingest", "augment", "pretrain", "evaluate", "register"):
        assert f"Stage '{stage}' didn't change, skipping" in output


def test_dvc_shows_the_graph_the_metrics_and_the_plots(repository: Repository) -> None:
    repository.run("git", "add", "-A")
    repository.run("git", "commit", "-qm", "run")
    dag = repository.run("dvc", "dag")
    assert all(stage in dag for stage in ("ingest", "augment", "pretrain", "evaluate", "register"))
    assert "few_shot.5-way 5-shot.pretrained.mean" in repository.run("dvc", "metrics", "show", "--md")
    repository.run("dvc", "metrics", "diff")
    repository.run("dvc", "plots", "show")
    page = (repository.folder / "dvc_plots" / "index.html").read_text()
    assert "energy_margin" in page
    assert "few_shot.png" in page


def test_another_method_is_one_word_and_needs_no_new_data(repository: Repository) -> None:
    output = repository.run("dvc", "exp", "run", "-S", "objective.name=vicreg", "-S", "pretrain.epochs=1")
    assert re.findall(r"Running stage '(\w+)'", output) == ["check", "discover", "pretrain", "evaluate", "register"]
    scores = repository.metrics("evaluate")
    assert scores["champion_version"] == "1"
    assert "champion" in scores["few_shot"]["5-way 5-shot"]
    with sqlite3.connect(repository.folder / "mlflow.db") as database:
        versions = database.execute("select version from model_versions").fetchall()
    decision = repository.metrics("register")
    assert len(versions) == 1
    assert decision["version"] is None
    assert "not those of the commit: params.yaml" in decision["rules"]["committed"]["reason"]


def test_what_was_refused_because_it_was_not_committed_is_looked_at_again_when_it_is(repository: Repository) -> None:
    repository.run("git", "commit", "-qam", "vicreg")
    output = repository.run("dvc", "repro")
    assert re.findall(r"Running stage '(\w+)'", output) == ["discover", "register"]
    assert repository.metrics("register")["rules"]["committed"]["passed"]


def test_the_registry_is_looked_at_by_its_command_line(repository: Repository) -> None:
    command = (sys.executable, "-m", "darkmatter.registry")
    assert "version 1 is what was registered" in repository.run(*command, "verify", "1")
    assert "there is no champion yet" in repository.run(*command, "history")
    assert "is the champion; promote another one first" in repository.run(*command, "delete", "1", fails=True)


@dataclasses.dataclass
class Rebuilt:
    """Version 1, trained again while the repository is at another commit."""

    folder: Path
    output: str
    changed: set[str]
    """Files of the repository that are not what they were before."""


@pytest.fixture(scope="module")
def rebuilt(repository: Repository) -> Rebuilt:
    def state() -> set[tuple[str, int, int]]:
        paths = [path for path in repository.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    folder, before = repository.folder.parent / "rebuilt", state()
    output = repository.run(sys.executable, "-m", "darkmatter.registry", "reproduce", "1", "--folder", str(folder))
    return Rebuilt(folder, output, {path for path, *_ in before ^ state()})


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: files.sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def test_a_version_is_trained_again_from_its_commit_to_the_same_weights(rebuilt: Rebuilt) -> None:
    folder, output = rebuilt.folder, rebuilt.output
    assert "version 1 is reproduced, bit for bit" in output
    assert "from commit" in output
    assert re.search(r"takes as long as the training did \(\d+ (s|min) then\)", output)
    assert re.findall(r"Running stage '(\w+)'", output) == [
        *("check", "discover", "ingest", "augment"), *("discover", "pretrain")
    ]  # fmt: skip
    assert "going on from step" not in output
    (run,) = (folder / "repository" / "checkpoints").glob("pretrain-*")
    steps = [row["step"] for row in read_history(str(run))]
    assert steps == list(range(1, int(steps[-1]) + 1))
    inside = folder / "version" / "artifacts" / "version"
    assert _weights(folder / "repository" / "models" / "backbone") == _weights(inside / "model") != {}


def test_to_train_a_version_again_touches_nothing_of_the_user(rebuilt: Rebuilt) -> None:
    assert rebuilt.changed == set()


def test_weights_of_another_seed_are_not_reproduced(rebuilt: Rebuilt, tmp_path: Path) -> None:
    """A version that says seed 0, with weights that another seed gives."""
    project = rebuilt.folder / "repository"
    origin = reproduce.Origin.read(rebuilt.folder / "version")
    assert list(reproduce.differences(origin, project)) == []
    _, spec, provenance = model.load(origin.inside / "model")
    model.save(tmp_path / "model", model.build(spec, seed=1), spec, provenance)
    forged = {**origin.lineage, "weights_sha256": register.weights_digest(tmp_path / "model")}
    (told, other, last) = reproduce.differences(dataclasses.replace(origin, inside=tmp_path, lineage=forged), project)
    assert "num_batches_tracked" not in told
    assert re.match(r"weights: \d+ of \d+ tensors in backbone.safetensors differ, most network.* by \d", told)
    assert "objective.safetensors" in other
    assert "code, params and data are equal" in last
    assert "not of seed 0 and commit" in last


def test_what_else_differs_is_named(rebuilt: Rebuilt, tmp_path: Path) -> None:
    project = rebuilt.folder / "repository"
    origin = reproduce.Origin.read(rebuilt.folder / "version")
    assert reproduce.other_data(origin, project) == ""
    message = reproduce.other_data(
        dataclasses.replace(origin, lineage={**origin.lineage, "training_data": "d" * 64}), project
    )
    assert "training data are others: dddddddddddd" in message
    assert "builtin:mnist has changed since" in message
    # The training set that the version was trained on is taken from a folder; another one is not.
    made = dataclasses.replace(origin, lineage={**origin.lineage, "training_data": "d" * 64})
    assert not reproduce.take_data(made, project, project / "data" / "train")
    assert not reproduce.take_data(origin, project, tmp_path / "nothing")
    (tmp_path / "clone" / "data" / "train").mkdir(parents=True)
    assert reproduce.take_data(origin, tmp_path / "clone", project / "data" / "train")
    assert reproduce.other_data(origin, tmp_path / "clone") == ""
    lock = copy.deepcopy(dict(origin.lock))
    (changed,) = (dep for dep in lock["pretrain"]["deps"] if dep["path"] == "components/darkmatter/health.py")
    changed["md5"] = "0" * 32
    lock["pretrain"]["params"]["params.yaml"]["pretrain"]["seed"] = 1
    forged = {**origin.lineage, "weights_sha256": "0" * 64, "fingerprint": "f" * 16}
    found = list(reproduce.differences(dataclasses.replace(origin, lock=lock, lineage=forged), project))
    assert "when it was trained: components/darkmatter/health.py" in found[0]
    assert found[1].endswith("trained with: pretrain")
    assert found[2].startswith("run: ffffffffffffffff then")


def test_a_commit_that_is_not_here_is_said_before_anything_is_done(repository: Repository, tmp_path: Path) -> None:
    other = Repository(tmp_path)
    shutil.copy2(repository.folder / "params.yaml", tmp_path)
    other.change(place={"mlflow": f"sqlite:///{repository.folder}/mlflow.db"})
    other.run("git", "init", "-q")
    command = [sys.executable, "-m", "darkmatter.registry", "reproduce", "1", "--folder", "rebuilt"]
    done = subprocess.run(command, cwd=tmp_path, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not in this repository; fetch it (git fetch origin " in done.stderr
    assert "Traceback" not in done.stderr
