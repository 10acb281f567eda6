"""Who gets in, and what gets out: sweeps of real servers without credentials, and canary secrets through the whole pipeline.

One MLflow with accounts on PostgreSQL and S3, one Ray head with a token, one run of `dvc repro` against both.
"""

import base64
import contextlib
import dataclasses
import gzip
import io
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from PIL import Image, PngImagePlugin

import s3
import servers
from conftest import copy_repository

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.cluster

#: What is secret, each with a value of its own. Those of `names` are file names, which stay where the labelled data is.
KINDS = (
    "aws_secret", "aws_key", "hf_token", "database", "webhook", "git_remote", "exif_text", "exif_gps", "xmp", "jpeg_comment",
    "png_text", "behind_the_end", "wrong_password", "wrong_token", "url_password", "query", "file_name", "reject_name",
)  # fmt: skip
NAMES = ("file_name", "reject_name")


@dataclasses.dataclass(frozen=True)
class World:
    root: Path
    repository: Path
    mlflow: servers.MLflow
    ray: servers.Ray
    canaries: Mapping[str, str]
    environment: Mapping[str, str]
    """Of a stage."""

    def run(self, *command: str, **changes: str) -> "subprocess.CompletedProcess[str]":
        environment = {**self.environment, **changes}
        return subprocess.run(
            command, cwd=self.repository, env=environment, capture_output=True, text=True, timeout=900
        )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    # Not below pytest's folder: another pytest that starts shuts it to the user that PostgreSQL runs as (seen).
    root = Path(tempfile.mkdtemp(prefix="doors-"))
    canaries = {kind: f"CNRY{secrets.token_hex(12)}" for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        patch.setattr(s3, "KEY", canaries["aws_key"])
        patch.setattr(s3, "SECRET", canaries["aws_secret"])
        (root / "s3" / "bucket").mkdir(parents=True)
        port = stack.enter_context(s3.server(root / "s3", remembers="1m"))
        storage = servers.s3_environment(port)
        mlflow = stack.enter_context(servers.mlflow(root / "m", s3_port=port, bucket="bucket"))
        plain = {
            **storage, **mlflow.admin, "HF_TOKEN": canaries["hf_token"], "SLACK_WEBHOOK": canaries["webhook"],
            "DATABASE_URL": f"postgresql://me:{canaries['database']}@127.0.0.1/db",
        }  # fmt: skip
        ray = stack.enter_context(
            servers.ray_head(root / "r", environment={**plain, "PYTHONPATH": str(ROOT / "components")})
        )
        environment = {**servers.CLEAN, **plain, **ray.token, "RAY_ADDRESS": ray.address, "DVC_NO_ANALYTICS": "1"}
        canaries |= {
            "mlflow_password": mlflow.admin["MLFLOW_TRACKING_PASSWORD"],
            "ray_token": ray.token["RAY_AUTH_TOKEN"],
        }
        repository = root / "repository"
        made = World(root, repository, mlflow, ray, canaries, environment)
        _repository(made)
        yield made


def _repository(world: World) -> None:
    """A copy of this one's files, with pictures full of secrets and a training of seconds."""
    copy_repository(world.repository)
    _pictures(world.root / "source", world.canaries)
    path = world.repository / "params.yaml"
    tree = yaml.safe_load(path.read_text())
    uri = f"folder:{world.root}/source"
    tree["source"] = {"uri": uri, "labels": False}
    tree["backbone"]["small_conv"] = {"width": 8}
    tree["pretrain"] |= {
        "epochs": 3,
        "batch_size": 64,
        "warmup_epochs": 1,
        "log_every": 2,
        "save_every": 5,
        "health_every": 10,
    }
    tree["pretrain"]["min_energy_margin"] = 0.0
    tree["evaluate"] = {
        "seed": 0,
        "beside": [],
        "few_shot": tree["evaluate"]["few_shot"],
        "rankme": {},
        "energy_margin": {},
    }
    tree["register"] |= {"min_energy_margin": 0.5, "min_rankme": 1.0}
    tree["register"]["card"]["written_for"] = uri
    tree["place"] |= {"storage": "s3://bucket/runs", "data": "s3://bucket/train", "cpus_per_worker": 1}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    remote = f"https://me:{world.canaries['git_remote']}@example.invalid/repository.git"
    for command in ("git init -q", "git config user.name n", "git config user.email e@example.org", "git add -A",
                    "git commit -qm start", f"git remote add origin {remote}"):  # fmt: skip
        subprocess.run(command.split(), cwd=world.repository, env=servers.CLEAN, check=True)


def _pictures(folder: Path, canaries: Mapping[str, str]) -> None:
    from darkmatter.sources import builtin

    folder.mkdir()
    source = builtin.open_source("mnist")
    items = list(source.items())[::12]
    for item, content in zip(items, source.read(items, limit=10_000), strict=True):
        (folder / f"{item.name}.png").write_bytes(content)
    image = Image.open(folder / f"{items[0].name}.png").convert("RGB").rotate(20)
    exif = Image.Exif()
    exif[0x010F] = canaries["exif_text"]
    gps = exif.get_ifd(0x8825)
    gps[1], gps[28] = "N", canaries["exif_gps"].encode()
    xmp = f"<x:xmpmeta>{canaries['xmp']}</x:xmpmeta>".encode()
    for number in range(8):  # enough for every split
        turned = image.rotate(3 * number)
        name = f"password={canaries['file_name']}-{number}"
        turned.save(folder / f"{name}.jpg", exif=exif, xmp=xmp, comment=canaries["jpeg_comment"].encode())
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", canaries["png_text"], zip=number % 2 == 0)
        turned.rotate(1).save(folder / f"{name}.png", exif=exif, pnginfo=text)
        with (folder / f"{name}.png").open("ab") as file:
            file.write(canaries["behind_the_end"].encode())
    (folder / f"token={canaries['reject_name']}.jpg").write_bytes(b"no picture")


# --- where secrets could be


def spellings(canary: str) -> list[bytes]:
    """As it stands, in UTF-16, in hex, and in base64 at each of its three phases."""
    raw = canary.encode()
    phases = [base64.b64encode(b"\0" * shift + raw)[4 if shift else 0 : -4] for shift in range(3)]
    return [raw, canary.encode("utf-16-le"), raw.hex().encode(), *phases]


def opened(content: bytes, depth: int = 0) -> Iterator[bytes]:
    """The bytes, and whatever is packed in them."""
    yield content
    if depth > 3:
        return
    inside: list[bytes] = []
    with contextlib.suppress(OSError, EOFError, zlib.error):
        if content[:2] == b"\x1f\x8b":
            inside.append(gzip.decompress(content))
    with contextlib.suppress(zlib.error):
        if content[:1] == b"\x78":  # objects of Git
            inside.append(zlib.decompress(content))
    with contextlib.suppress(zipfile.BadZipFile, NotImplementedError):
        if content[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                inside += [packed.read(name) for name in packed.namelist()]
    if content[:4] == b"PAR1":
        import pyarrow.parquet as pq

        inside.append(str(pq.read_table(io.BytesIO(content)).to_pydict()).encode())
    for start in [match.start() for match in re.finditer(rb"\x89PNG\r\n|\xff\xd8\xff", content)][:2000]:
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content[start : start + 2**20])) as image:
            image.load()
            inside.append(f"{image.info}{dict(image.getexif())}{dict(image.getexif().get_ifd(0x8825))}".encode())
    for match in re.finditer(rb"[A-Za-z0-9+/]{120,}={0,2}", content):
        with contextlib.suppress(ValueError):
            inside.append(base64.b64decode(match[0] + b"=" * (-len(match[0]) % 4)))
    for one in inside:
        yield from opened(one, depth + 1)


def hits(content: bytes, canaries: Mapping[str, str]) -> set[str]:
    """Kinds of the canaries in it."""
    wanted = {kind: spellings(canary) for kind, canary in canaries.items()}
    return {kind for part in opened(content) for kind, forms in wanted.items() if any(form in part for form in forms)}


def hits_below(folder: Path, canaries: Mapping[str, str], *, leave: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Kind -> files, relative, whose content or name holds it."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and not name.startswith(leave):
            for kind in hits(path.read_bytes(), canaries) | hits(name.encode(), canaries):
                found.setdefault(kind, set()).add(name)
    return found


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    canary = {"x": f"CNRY{secrets.token_hex(12)}"}
    secret = canary["x"].encode()
    packed, text, picture, table = io.BytesIO(), PngImagePlugin.PngInfo(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", secret * 3)
    text.add_text("Comment", canary["x"], zip=True)
    Image.new("RGB", (9, 9)).save(picture, format="PNG", pnginfo=text)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [canary["x"]] * 9}), table, compression="zstd")
    page = b"src=data:image/png;base64," + base64.b64encode(picture.getvalue() + bytes(99))
    for content in (b"x" + secret, gzip.compress(secret), packed.getvalue(), zlib.compress(secret), picture.getvalue(),
                    table.getvalue(), base64.b64encode(b"1" + secret + b"2"), page, b"tar" + picture.getvalue(),
                    secret.hex().encode(), canary["x"].encode("utf-16-le")):  # fmt: skip
        assert hits(content, canary) == {"x"}, content
    (tmp_path / canary["x"]).touch()
    assert hits_below(tmp_path, canary) == {"x": {canary["x"]}}


# --- what gets out


@pytest.fixture(scope="module")
def run(world: World) -> "subprocess.CompletedProcess[str]":
    done = world.run("dvc", "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    decision = json.loads((world.repository / "metrics" / "register.json").read_text())
    assert decision["version"] == "1", decision
    world.run("git", "add", "-A")
    world.run("git", "commit", "-qm", "run")
    return done


def test_no_secret_is_in_what_a_run_prints_or_leaves(world: World, run: "subprocess.CompletedProcess[str]") -> None:
    secret = {kind: canary for kind, canary in world.canaries.items() if kind not in NAMES}
    assert hits((run.stdout + run.stderr).encode(), world.canaries) == set()
    # The picture files themselves, what the test gave the servers to start with, and Git's own note of its remote.
    given = ("source/", "m/basic_auth.ini", "repository/.git/config", "m/pg/")
    assert hits_below(world.root, secret, leave=given) == {}
    assert any(hits_below(world.root / "source", secret)), "they were there"


def test_a_file_name_stays_with_the_labelled_data(world: World, run: "subprocess.CompletedProcess[str]") -> None:
    """rejects.jsonl has to name files. Nothing of it reaches training, MLflow or a version."""
    names = {kind: canary for kind, canary in world.canaries.items() if kind in NAMES}
    found = hits_below(world.root, names, leave=("source/", "m/pg/"))
    assert set(found) == set(NAMES)
    places = {name.removeprefix("repository/") for files in found.values() for name in files}
    allowed = re.compile(r"data/shards/(rejects\.jsonl|files\.parquet)|\.dvc/cache/files/md5/../\w+")
    assert [name for name in places if not allowed.fullmatch(name)] == []
    tars = list((world.repository / "data").rglob("*.tar")) + list((world.root / "s3").rglob("*.tar"))
    assert len(tars) >= 4
    assert all(hits(path.read_bytes(), names) == set() for path in tars)


def test_no_secret_is_in_the_rows_of_mlflow(world: World, run: "subprocess.CompletedProcess[str]") -> None:
    code = (
        "import mlflow; c = mlflow.MlflowClient(); e = [x.experiment_id for x in c.search_experiments()]\n"
        "runs = c.search_runs(e); print([r.to_dictionary() for r in runs])\n"
        "print([dict(v) for v in c.search_model_versions('')], [dict(m) for m in c.search_registered_models()])\n"
        "print([m.to_dictionary() for m in c.search_logged_models(e)], [dict(x) for x in c.search_experiments()])"
    )
    done = world.run(sys.executable, "-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
    assert "weights_sha256" in done.stdout
    assert "train/loss" in done.stdout
    assert hits(done.stdout.encode(), world.canaries) == set()


HISTORY = ("-m", "darkmatter.registry", "history")
READ = (
    "-c",
    "import sys; from darkmatter import console, remote; console.run(lambda: remote.read(sys.argv[1], limit=9))",
)
SESSION = (
    "-c",
    "from darkmatter import cluster, console\ndef stage():\n    with cluster.session(): pass\nconsole.run(stage)",
)


@pytest.mark.parametrize(
    ("command", "changes", "argument"),
    [
        (HISTORY, {"MLFLOW_TRACKING_PASSWORD": "{wrong_password}"}, ""),
        (HISTORY, {"MLFLOW_TRACKING_URI": "http://me:{url_password}@127.0.0.1:9"}, ""),
        pytest.param(
            HISTORY,
            {"MLFLOW_TRACKING_URI": "postgresql://me:{url_password}@127.0.0.1:9/db"},
            "",
            marks=pytest.mark.long,  # MLflow tries for two minutes
        ),
        (HISTORY, {"MLFLOW_TRACKING_URI": "what://me:{url_password}@127.0.0.1:9/db"}, ""),
        (READ, {"AWS_SECRET_ACCESS_KEY": "{wrong_password}"}, "s3://bucket/x"),
        (READ, {}, "http://me:{url_password}@127.0.0.1:9/a.tar?X-Amz-Signature={query}"),
        (READ, {}, "what://me:{url_password}@host/a?token={query}"),
        (SESSION, {"RAY_AUTH_TOKEN": "{wrong_token}", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}, ""),
    ],
    ids=[
        "password",
        "mlflow-away",
        "database-away",
        "no-such-scheme",
        "s3-key",
        "http-away",
        "no-protocol",
        "ray-token",
    ],
)
def test_no_secret_is_in_what_a_failure_prints(
    world: World, command: tuple[str, ...], changes: dict[str, str], argument: str
) -> None:
    changes = {name: value.format(**world.canaries) for name, value in changes.items()}
    given = {**changes, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    done = world.run(sys.executable, *command, *filter(None, [argument.format(**world.canaries)]), **given)
    assert done.returncode != 0
    assert hits((done.stdout + done.stderr).encode(), world.canaries) == set(), done.stdout + done.stderr


def test_a_password_in_params_ends_the_check_without_showing_it(world: World) -> None:
    path = world.repository / "params.yaml"
    before = path.read_text()
    try:
        path.write_text(before.replace("s3://bucket/train", f"s3://me:{world.canaries['url_password']}@bucket/train"))
        done = world.run(sys.executable, "pipelines/check.py")
    finally:
        path.write_text(before)
    assert done.returncode == 2
    assert "place.data holds a password" in done.stderr
    assert hits((done.stdout + done.stderr).encode(), world.canaries) == set()


# --- who gets in

RAY = (
    "GET /api/version", "GET /api/jobs/",
    "POST /api/jobs/", "GET /api/jobs/x", "POST /api/jobs/x/stop", "DELETE /api/jobs/x",
    "GET /api/jobs/x/logs", "GET /api/packages/gcs/x.zip", "PUT /api/packages/gcs/x.zip", "GET /nodes?view=summary",
    "GET /api/cluster_status", "GET /api/v0/nodes", "GET /api/v0/actors", "GET /api/v0/tasks", "GET /api/v0/workers",
    "GET /api/v0/logs", "GET /api/v0/logs/file?node_id=x&filename=y", "GET /logical/actors",
    "GET /api/serve/applications/", "PUT /api/serve/applications/",
    "DELETE /api/serve/applications/", "GET /api/prometheus/sd", "GET /events",
    "GET /worker/traceback?pid=1", "GET /worker/cpu_profile?pid=1", "GET /api/component_activities",
    "GET /api/train/v2/runs",
)  # fmt: skip
#: What answers everyone: the page (files of Ray itself) and whether it is alive. Neither tells anything of a run.
RAY_OPEN = ("/", "/api/gcs_healthz")


def let_in(server: str, endpoints: Mapping[str, Any], **options: Any) -> dict[str, int]:
    """The endpoints, each with its body, that answered something else than 401 and 403, and what."""
    answers = {}
    for endpoint, body in endpoints.items():
        method, path = endpoint.split(" ")
        answers[endpoint] = requests.request(
            method, server + path, json=body, allow_redirects=False, **options
        ).status_code
    return {endpoint: code for endpoint, code in answers.items() if code not in (401, 403)}


@pytest.mark.parametrize("token", [None, "0" * 64, ""], ids=["without", "wrong", "empty"])
def test_ray_answers_nobody_without_the_token(world: World, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    body = {"entrypoint": f"touch {world.root}/ran", "submission_id": "x"}
    assert let_in(world.ray.dashboard, dict.fromkeys(RAY, body), headers=headers, timeout=30) == {}
    for path in RAY_OPEN:
        assert requests.get(world.ray.dashboard + path, headers=headers, timeout=30).status_code == 200
    assert not (world.root / "ran").exists()


def test_ray_lets_no_program_connect_without_the_token(world: World) -> None:
    for changes in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}):
        code = "import ray; ray.init(log_to_driver=False)\n"
        code += f"ray.get(ray.remote(lambda: open('{world.root}/ran', 'w').close()).remote())"
        done = world.run(
            sys.executable, "-c", code, HOME="/nonexistent", RAY_gcs_rpc_server_reconnect_timeout_s="5", **changes
        )
        assert done.returncode != 0
        assert not (world.root / "ran").exists()
        assert re.search("(?i)unauthenticated|token|authenti", done.stderr), done.stderr


API, AJAX = "/api/2.0/mlflow", "/ajax-api/2.0/mlflow"
MLFLOW: Mapping[str, Any] = {
    f"POST {API}/experiments/search": {"max_results": 9},
    f"POST {API}/experiments/create": {"name": "evil"},
    f"POST {API}/runs/search": {"experiment_ids": ["0"]},
    f"POST {API}/runs/create": {"experiment_id": "0"},
    f"POST {API}/runs/log-parameter": {"run_id": "x", "key": "a", "value": "b"},
    f"POST {API}/registered-models/create": {"name": "evil"},
    f"GET {API}/registered-models/search": None,
    f"GET {API}/model-versions/search": None,
    f"POST {API}/registered-models/alias": {"name": "darkmatter-backbone", "alias": "champion", "version": "1"},
    f"DELETE {API}/model-versions/delete": {"name": "darkmatter-backbone", "version": "1"},
    f"POST {API}/logged-models/search": {"experiment_ids": ["0"]},
    f"PUT {API.replace('/mlflow', '')}/mlflow-artifacts/artifacts/evil.txt": None,
    f"GET {API.replace('/mlflow', '')}/mlflow-artifacts/artifacts": None,
    f"DELETE {API.replace('/mlflow', '')}/mlflow-artifacts/artifacts/0": None,
    f"POST {AJAX}/experiments/search": {"max_results": 9},
    f"GET {AJAX}/metrics/get-history-bulk?run_id=x&metric_key=y": None,
    f"GET {API}/webhooks": None,
    f"POST {API}/webhooks": {"name": "evil", "url": "https://example.invalid", "events": []},
    f"POST {API}/users/create": {"username": "evil", "password": "evil-password-12"},
    f"GET {API}/users/get?username=admin": None,
    f"PATCH {API}/users/update-admin": {"username": "evil", "is_admin": True},
    "POST /graphql": {"query": "{ __typename }"},
    "GET /get-artifact?path=x&run_uuid=y": None,
    "GET /model-versions/get-artifact?name=x&version=1&path=y": None,
    "GET /signup": None,
    "GET /": None,
    "GET /version": None,
}
#: Whether it is alive.
MLFLOW_OPEN = ("/health",)


@pytest.mark.parametrize(
    "auth",
    [None, ("admin", "wrong"), ("nobody", "wrong"), ("admin", "")],
    ids=["without", "wrong", "stranger", "empty"],
)
def test_mlflow_answers_nobody_without_a_password(world: World, auth: tuple[str, str] | None) -> None:
    assert let_in(world.mlflow.uri, MLFLOW, auth=auth, timeout=60) == {}
    for path in MLFLOW_OPEN:
        assert requests.get(world.mlflow.uri + path, timeout=30).status_code == 200


def test_who_may_read_mlflow_may_not_write(world: World, run: "subprocess.CompletedProcess[str]") -> None:
    reader = world.mlflow.add_user("reader", secrets.token_urlsafe(16))
    auth = ("reader", reader["MLFLOW_TRACKING_PASSWORD"])
    for endpoint in (
        f"POST {API}/registered-models/alias", f"DELETE {API}/model-versions/delete", f"POST {API}/users/create",
        f"PATCH {API}/users/update-admin",
    ):  # fmt: skip
        method, path = endpoint.split(" ")
        answer = requests.request(method, world.mlflow.uri + path, json=MLFLOW[endpoint], auth=auth, timeout=60)
        assert answer.status_code == 403, endpoint
    assert requests.get(f"{world.mlflow.uri}{API}/model-versions/search", auth=auth, timeout=60).status_code == 200
