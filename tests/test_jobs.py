"""A job around a pipeline of toy stages, with real Git and real DVC. tests/pipelines/test_nights.py has the real stages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import servers
from darkmatter import jobs, params

ROOT = Path(__file__).parent.parent

STAGES = """
stages:
  discover:
    cmd: python stage.py discover
    always_changed: true
    outs: [data/source.json]
  ingest:
    cmd: python stage.py ingest
    deps: [data/source.json]
    outs: [data/shards: {persist: true}]
    metrics: [metrics/ingest.json: {cache: false}]
  augment:
    cmd: python stage.py augment
    deps: [data/shards]
    outs: [data/train: {persist: true}]
  register:
    cmd: python stage.py register
    deps: [data/train]
    params: [toy.yaml: ]
    metrics: [metrics/register.json: {cache: false}]
"""
STAGE = """
import json, sys, time
from pathlib import Path
import yaml
from darkmatter import console

def main():
    stage, toy = sys.argv[1], yaml.safe_load(Path("toy.yaml").read_text())
    photos = sorted(Path(toy["photos"]).iterdir())
    for folder in ("data/shards", "data/train", "metrics"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if stage == "discover":
        Path("data/source.json").write_text(json.dumps([str(one) for one in photos]))
    if stage in ("ingest", "augment"):
        out = Path("data/shards" if stage == "ingest" else "data/train")
        source = photos if stage == "ingest" else sorted(Path("data/shards").iterdir())
        new = [one for one in source if not (out / one.name).exists()]
        print(stage, "adds", len(new), "to", len(list(out.iterdir())))
        for one in new:
            (out / one.name).write_bytes(one.read_bytes())
        Path("metrics/ingest.json").write_text(json.dumps({"samples": len(photos)}))
    if stage == "register":
        if toy["does"] == "fails":
            raise ValueError("the disk of node 3 is on fire")
        if toy["does"] == "dies":
            import os; os.kill(os.getpid(), 9)
        if toy["does"] == "waits":
            import signal
            def saved(*_):
                raise console.Preempted("saved at step 12")
            signal.signal(signal.SIGTERM, saved)
            Path(toy["photos"]).with_name("waiting").touch()
            time.sleep(60)
        Path("metrics/register.json").write_text(json.dumps(toy["decision"]))

console.run(main)
"""


def decision(version: str | None, alias: list[str], **failed: str) -> dict:
    rules = {"finite weights": {"passed": True, "reason": "they are"}}
    rules |= {name.replace("_", " "): {"passed": False, "reason": reason} for name, reason in failed.items()}
    return {"version": version, "alias": alias, "new": True, "rules": rules}


CHAMPION = decision("1", ["candidate", "champion"])


class Toy:
    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.origin = folder, folder / "work", folder / "origin.git"
        (folder / "photos").mkdir()
        (folder / "photos" / "a").write_text("a")
        self.work.mkdir()
        tree = yaml.safe_load((ROOT / "params.yaml").read_text())
        (self.work / "params.yaml").write_text(yaml.safe_dump(tree))
        (self.work / "dvc.yaml").write_text(STAGES)
        (self.work / "stage.py").write_text(STAGE)
        (self.work / ".gitignore").write_text("/data/\n/.dvc/tmp\n/.dvc/cache\n/.dvc/config.local\n")
        # A lock of another place, which says that all is done.
        (self.work / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
        (self.work / "metrics").mkdir()
        (self.work / "metrics" / "register.json").write_text(json.dumps(decision("77", ["champion"])))
        self.place = folder / "place.yaml"
        place = {
            "storage": str(folder / "storage"),
            "mlflow": f"sqlite:///{folder}/mlflow.db",
            "dvc": str(folder / "dvc"),
        }
        self.place.write_text(yaml.safe_dump(place))
        self._git("init", "-q", "-b", "main")
        subprocess.run(["dvc", "init", "-q"], cwd=self.work, env=servers.CLEAN, check=True)
        self.set()
        subprocess.run(["git", "clone", "-q", "--bare", str(self.work), str(self.origin)], check=True)
        self._git("remote", "add", "origin", str(self.origin))

    def set(self, does: str = "works", found: dict = CHAMPION) -> None:
        toy = {"photos": str(self.folder / "photos"), "does": does, "decision": found}
        (self.work / "toy.yaml").write_text(yaml.safe_dump(toy))
        self._git("add", "-A")
        self._git("commit", "-qm", does)
        if self.origin.exists():
            self._git("push", "-q", "origin", "main")

    def job(self) -> jobs.Outcome:
        return jobs.run(str(self.origin), "main", branch="runs/nightly")

    def on_branch(self, path: str) -> str:
        return self._git("show", f"runs/nightly:{path}", folder=self.origin)

    def log(self) -> list[str]:
        return self._git("log", "--format=%s", "runs/nightly", folder=self.origin).splitlines()

    def _git(self, *arguments: str, folder: Path | None = None) -> str:
        environment = {**servers.CLEAN, **servers.IDENTITY}
        done = subprocess.run(
            ["git", *arguments], cwd=folder or self.work, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy(tmp_path)
    monkeypatch.setenv(params.PLACE, str(made.place))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "components"))
    return made


def test_each_night_does_what_is_new_and_the_branch_tells_it(toy: Toy, capfd: pytest.CaptureFixture) -> None:
    first = toy.job()
    assert (first.kind, first.version, jobs.STATUS[first.kind]) == ("champion", "1", 0)
    assert json.loads(toy.on_branch("metrics/register.json")) == CHAMPION, "not that of the other place"
    assert first.ingested == {"samples": 1}

    tip = toy.log()
    second = toy.job()
    assert (second.kind, second.reason) == ("nothing new", "nothing has changed since version 1")
    assert toy.log() == tip

    (toy.folder / "photos" / "b").write_text("b")
    worse = decision("2", ["candidate"], beats_the_champion="it does not")
    toy.set(found=worse)
    capfd.readouterr()
    third = toy.job()
    printed = capfd.readouterr().out
    assert "ingest adds 1 to 1" in printed, "what was there was fetched, and not made again"
    assert "augment adds 1 to 1" in printed
    assert (third.kind, third.version, third.rules_failed) == ("candidate", "2", ["beats the champion"])

    toy.set(found=decision(None, [], data_as_before="half of it is corrupt"))
    fourth = toy.job()
    assert (fourth.kind, jobs.STATUS[fourth.kind], fourth.version) == ("refused", 3, None)
    assert "half of it is corrupt" in fourth.reason
    assert toy.log()[0].endswith(": refused")
    fifth = toy.job()
    assert (fifth.kind, fifth.rules_failed) == ("refused", ["data as before"]), "asking again does not make it good"
    assert fifth.reason.startswith("nothing has changed since the gate refused it. data as before: half")
    runs = [line.rpartition(" ")[2] for line in toy.log() if line.startswith("Run of")]
    assert runs == ["refused", "candidate", "data", "champion", "data"]


def test_a_stage_that_fails_says_why_and_what_was_done_is_kept(toy: Toy, capfd: pytest.CaptureFixture) -> None:
    toy.set("fails")
    failed = toy.job()
    assert (failed.kind, jobs.STATUS[failed.kind]) == ("failed", 1)
    assert failed.reason == "register: the disk of node 3 is on fire"
    assert set(yaml.safe_load(toy.on_branch("dvc.lock"))["stages"]) == {"discover", "ingest", "augment"}
    toy.set()
    capfd.readouterr()
    assert toy.job().kind == "champion"
    assert "ingest adds" not in capfd.readouterr().out


def test_a_stage_that_dies_without_a_word_is_a_failure(toy: Toy) -> None:
    toy.set("dies")
    outcome = toy.job()
    assert (outcome.kind, outcome.reason) == ("failed", "a stage ended without a word; see the log")


def test_what_the_remote_does_not_take_the_branch_is_not_told(toy: Toy) -> None:
    """A lock that names data that nobody has would make the next night skip what it cannot fetch."""
    (toy.folder / "dvc").write_text("a file where the remote should be")
    outcome = toy.job()
    assert outcome.kind == "failed"
    assert "DVC's remote did not take what was made" in outcome.reason
    with pytest.raises(subprocess.CalledProcessError):
        toy.log()


def test_sigterm_lets_the_stage_save_and_asks_for_another_try(toy: Toy) -> None:
    toy.set("waits")
    command = [sys.executable, "-m", "darkmatter.jobs", "run", "--repository", str(toy.origin)]
    environment = {**servers.CLEAN, "PYTHONPATH": str(ROOT / "components"), params.PLACE: str(toy.place)}
    process = subprocess.Popen(
        command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (toy.folder / "waiting").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 75, printed
    assert "job: stopped: saved at step 12" in printed
    assert toy.log()[0].endswith(": data"), "no stage was finished since"


def test_a_second_job_of_the_branch_is_refused(toy: Toy) -> None:
    with jobs._lease(f"{toy.folder}/storage/jobs/runs-nightly", 0):
        outcome = toy.job()
    assert (outcome.kind, jobs.STATUS[outcome.kind]) == ("busy", 75)
    assert f"process {os.getpid()} on" in outcome.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": "checkpoints"}, "place.storage: checkpoints is in the clone"),
        ({"mlflow": "sqlite:///mlflow.db"}, "place.mlflow: mlflow.db is in the clone"),
    ],
)
def test_a_place_that_goes_with_the_clone_is_refused(change: dict, message: str, toy: Toy) -> None:
    toy.place.write_text(yaml.safe_dump({**yaml.safe_load(toy.place.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        toy.job()


def test_what_is_not_there_is_named_and_no_password_is_shown(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no branch, tag or commit 'mian'"):
        jobs.run(str(toy.origin), "mian", branch="b")
    with pytest.raises(ValueError, match=r"git clone") as error:
        jobs.run("https://me:hunter2@127.0.0.1:9/x.git", "main", branch="b")
    assert "hunter2" not in str(error.value)


def test_a_job_is_submitted_to_an_address_of_a_dashboard_only() -> None:
    with pytest.raises(ValueError, match="is no address of a cluster's dashboard"):
        jobs.main(["submit", "--repository", "r", "--address", "127.0.0.1:6379"])
