"""The nightly job on a cluster, night after night: Ray with token auth, MLflow with accounts on PostgreSQL, S3, Git."""

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

import s3
import servers
from conftest import copy_repository

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parent.parent.parent
BRANCH = "runs/nightly"


class Webhook:
    """What is posted to it."""

    def __init__(self) -> None:
        self.heard: list[dict] = []
        heard = self.heard

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hooks/secret"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class World:
    """A cluster, its servers, a repository to run and a source that grows."""

    def __init__(
        self, folder: Path, ray: servers.Ray, mlflow: servers.MLflow, store: dict[str, str], webhook: Webhook
    ) -> None:
        self.folder, self.ray, self.mlflow, self.store, self.webhook = folder, ray, mlflow, store, webhook
        self.repository, self.photos = folder / "repository.git", folder / "photos"
        self.place = folder / "place.yaml"

    def add_digits(self, numbers: slice, *, cut: int = 0) -> None:
        """Some of the 5,000 built-in digits, as files in a folder a class; each `cut`-th is truncated."""
        from darkmatter.sources import builtin

        source = builtin.open_source("mnist")
        items = list(source.items())[numbers]
        for number, (item, content) in enumerate(zip(items, source.read(items, limit=10_000), strict=True)):
            path = self.photos / str(item.label) / f"{item.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[:60] if cut and number % cut == 0 else content)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "darkmatter.jobs", "submit", "--repository", str(self.repository)]
        command += ["--branch", BRANCH, "--place", str(self.place), *arguments]
        environment = {**servers.CLEAN, **self.ray.token, "RAY_API_SERVER_ADDRESS": self.ray.dashboard}
        environment["PYTHONPATH"] = str(ROOT / "components")
        return subprocess.Popen(
            command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def night(self, *arguments: str) -> tuple[int, str, dict]:
        """Exit status, what it printed, what it told."""
        process = self.start(*arguments)
        printed, _ = process.communicate()
        assert self.webhook.heard, printed
        return process.returncode, printed, self.webhook.heard.pop()

    def kill_job(self) -> None:
        """SIGKILL to the job and to all that it has started."""
        for job in psutil.Process(self.ray.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # also of those that have ended and are not waited for yet
                if "darkmatter.jobs" in job.cmdline():
                    break
        else:
            raise AssertionError("no job runs")
        for one in (job, *job.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def versions(self) -> dict[str, list[str]]:
        """Of the registered model, with their aliases."""
        code = (
            "import json, mlflow; c = mlflow.MlflowClient(); n = 'darkmatter-backbone'; "
            "print(json.dumps({v.version: sorted(c.get_model_version(n, v.version).aliases) "
            "for v in c.search_model_versions(f\"name='{n}'\")}))"
        )
        environment = {**servers.CLEAN, **self.mlflow.admin}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        return {str(version): aliases for version, aliases in json.loads(done.stdout.splitlines()[-1]).items()}

    def tip(self) -> str:
        return self._git("rev-parse", BRANCH)

    def on_branch(self, path: str) -> str:
        return self._git("show", f"{BRANCH}:{path}")

    def manifest(self, folder: str) -> dict:
        """Of the data that the branch names, from DVC's remote."""
        with tempfile.TemporaryDirectory() as name:
            self._git("worktree", "add", "-q", name, BRANCH)
            for command in (["remote", "add", "--local", "-d", "store", "s3://bucket/dvc"], ["pull", "-q", folder]):
                subprocess.run(["dvc", *command], cwd=name, env={**servers.CLEAN, **self.store}, check=True)
            found = json.loads(Path(name, folder, "manifest.json").read_text())
            self._git("worktree", "remove", "--force", name)
        return found

    def change_params(self, **sections: dict) -> None:
        """In a commit on main."""
        work = self.folder / "work"
        tree = yaml.safe_load((work / "params.yaml").read_text())
        for name, changes in sections.items():
            tree[name] |= changes
        (work / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        for command in ("commit -qam change", f"push -q {self.repository} main"):
            subprocess.run(["git", *command.split()], cwd=work, env={**os.environ, **servers.IDENTITY}, check=True)

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="dm-"))  # PostgreSQL and Ray listen on sockets in it: a short path
    webhook = Webhook()
    try:
        (folder / "s3" / "bucket").mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            s3_port = stack.enter_context(s3.server(folder / "s3", remembers="1m"))
            mlflow = stack.enter_context(servers.mlflow(folder / "mlflow", s3_port=s3_port, bucket="bucket"))
            store = servers.s3_environment(s3_port)
            environment = {
                **store,
                **mlflow.admin,
                "DARKMATTER_WEBHOOK": webhook.url,
                "PYTHONPATH": str(ROOT / "components"),
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            }
            ray = stack.enter_context(servers.ray_head(folder / "ray", environment=environment))
            made = World(folder, ray, mlflow, store, webhook)
            made.add_digits(slice(0, None, 3))
            _make_repository(made)
            yield made
    finally:
        webhook.close()
        shutil.rmtree(folder, ignore_errors=True)


def _make_repository(world: World) -> None:
    """This repository's files as they are, with params for a training of seconds, and one commit."""
    work = world.folder / "work"
    copy_repository(work, results=True)
    tree = yaml.safe_load((work / "params.yaml").read_text())
    tree["source"] = {"uri": f"folder:{world.photos}", "labels": True}
    tree["ingest"] |= {"samples_per_shard": 128, "test_fraction": 0.25}
    tree["backbone"] = {"name": "small_conv", "small_conv": {"width": 16}}
    tree["pretrain"] |= {"epochs": 10, "batch_size": 64, "warmup_epochs": 1, "log_every": 4, "save_every": 8}
    few_shot = {"ways": [5], "shots": [5], "episodes": 100, "queries": 10, "classifiers": ["centroid"]}
    tree["evaluate"] = {"seed": 0, "beside": [], "few_shot": few_shot, "rankme": {}, "energy_margin": {}}
    tree["register"]["card"] |= {"written_for": tree["source"]["uri"]}
    (work / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    bucket = "s3://bucket"
    world.place.write_text(
        yaml.safe_dump(
            {
                "cpus_per_worker": 1,
                "storage": f"{bucket}/checkpoints",
                "data": f"{bucket}/train",
                "cache": str(world.folder / "cache"),
                "features": f"{bucket}/features",
                "dvc": f"{bucket}/dvc",
            }
        )
    )
    for command in ("init -q -b main", "add -A", "commit -qm start", f"clone -q --bare . {world.repository}"):
        subprocess.run(["git", *command.split()], cwd=work, env={**os.environ, **servers.IDENTITY}, check=True)


def test_night_1_trains_from_nothing_and_promotes(world: World) -> None:
    status, printed, told = world.night()
    assert (status, told["kind"], told["version"]) == (0, "champion", "1"), printed
    assert world.versions() == {"1": ["candidate", "champion"]}
    assert json.loads(world.on_branch("metrics/register.json"))["version"] == "1"
    assert told["text"].endswith("champion: version 1 is the champion")
    assert "secret" not in printed, "the address of the webhook is a secret"
    # The data are in DVC's remote, the checkpoints and the version in the store, and nothing of it in a shared folder.
    folders = {path.name for path in (world.folder / "s3" / "bucket").iterdir()}
    assert folders >= {"dvc", "checkpoints", "train", "features", "mlflow"}


def test_night_2_has_nothing_new_and_registers_nothing(world: World) -> None:
    before = world.tip()
    status, printed, told = world.night()
    assert (status, told["kind"]) == (0, "nothing new"), printed
    assert told["reason"] == "nothing has changed since version 1"
    for stage in ("ingest", "augment", "pretrain", "evaluate", "register"):
        assert f"Running stage '{stage}'" not in printed
    assert world.versions() == {"1": ["candidate", "champion"]}
    assert world.tip() == before


def test_night_3_killed_with_new_images_and_run_again_ingests_those_only(world: World) -> None:
    """From the champion's weights; a second job at the same time is refused. 10% more images."""
    old = {one["path"]: one["sha256"] for one in world.manifest("data/shards")["shards"]}
    world.add_digits(slice(1, None, 30))
    world.change_params(pretrain={"warm_start": "models:/darkmatter-backbone@champion"})
    process = world.start()
    runs = world.folder / "s3" / "bucket" / "checkpoints"
    known = set(runs.glob("pretrain-*"))
    _wait_until(lambda: any((run / "step-0000016").exists() for run in set(runs.glob("pretrain-*")) - known), process)

    status, printed, told = world.night()
    assert (status, told["kind"]) == (75, "busy"), printed
    assert "runs a job of this branch" in told["reason"]

    world.kill_job()
    process.communicate()
    assert process.returncode != 0
    assert not world.webhook.heard, "who is killed tells nothing"

    status, printed, told = world.night()
    assert (status, told["version"]) == (0, "2"), printed
    assert "Running stage 'ingest'" not in printed, "the data were kept before the training began"
    resumed = re.search(r"going on from step (\d+)", printed)
    assert resumed, printed
    assert int(resumed[1]) >= 16
    assert re.search(r"starting from model \w{12}\n", printed), "all of it fits"
    rule = json.loads(world.on_branch("metrics/register.json"))["rules"]["beats the champion"]
    assert told["kind"] == ("champion" if rule["passed"] else "candidate")
    assert world.versions()[told["version"]] == (["candidate", "champion"] if rule["passed"] else ["candidate"])
    new = {one["path"]: one["sha256"] for one in world.manifest("data/shards")["shards"]}
    assert old.items() < new.items(), "old shards keep their bytes"


def test_night_4_poisoned_data_is_named_and_refused_and_the_champion_stays(world: World) -> None:
    before = world.versions()
    world.add_digits(slice(2, None, 30), cut=2)
    status, printed, told = world.night()
    assert (status, told["kind"]) == (3, "refused"), printed
    assert "data as before" in told["rules_failed"]
    assert "rejected as damaged 50%" in told["reason"]
    assert told["ingested"]["rejects_by_reason"]
    assert world.versions() == before
    assert json.loads(world.on_branch("metrics/register.json"))["version"] is None


def test_a_consumer_who_may_only_read_loads_the_champion_over_http(world: World) -> None:
    reader = world.mlflow.add_user("reader", "correct horse battery staple")
    code = """
import sys, mlflow, pandas
from pathlib import Path
model = mlflow.pyfunc.load_model("models:/darkmatter-backbone@champion")
print(model.predict(pandas.DataFrame({"image": [Path(sys.argv[1]).read_bytes()] * 3})).shape)
try:
    mlflow.MlflowClient().set_registered_model_alias("darkmatter-backbone", "champion", "1")
except mlflow.exceptions.MlflowException as error:
    print(error.error_code)
"""
    picture = next((world.photos / "3").iterdir())
    environment = {**servers.CLEAN, **reader, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(picture)]
    done = subprocess.run(command, env=environment, cwd=world.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, refusal = done.stdout.strip().splitlines()[-2:]
    assert shape.startswith("(3, ")
    assert refusal == "PERMISSION_DENIED"


def _wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
