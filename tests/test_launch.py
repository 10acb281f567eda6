import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import free_port
from darkmatter import files, launch
from servers import CLEAN

TOKEN = "t" * 64


def listening(process: psutil.Process) -> set[str]:
    """Addresses at which it and its children listen."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        for line in one.net_connections("inet"):
            if line.status == psutil.CONN_LISTEN:
                found.add(line.laddr.ip.removeprefix("::ffff:"))
    return found


@pytest.fixture
def token(tmp_path: Path) -> Path:
    launch.new_token(tmp_path / "token")
    return tmp_path / "token"


def test_a_token_is_new_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for name in ("a", "b"):
            launch.new_token(tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()
    with pytest.raises(launch.Refused, match="is there already"):
        launch.new_token(tmp_path / "a")


def test_ray_gets_the_path_of_the_token_and_not_the_token(token: Path) -> None:
    environment = launch.with_token({"RAY_AUTH_TOKEN": TOKEN, "A": "b"}, token)
    assert environment == {"A": "b", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert launch.with_token({"RAY_AUTH_TOKEN_PATH": str(token)}, None)["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert launch.with_token({"RAY_AUTH_TOKEN": TOKEN}, None)["RAY_AUTH_MODE"] == "token"
    usual = token.parent / ".ray" / "auth_token"
    launch.new_token(usual)
    found = launch.with_token({"HOME": str(token.parent)}, None)
    assert found["RAY_AUTH_TOKEN_PATH"] == str(usual)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "not started without a token"),
        ({"RAY_AUTH_TOKEN": "short"}, "5 characters and could be guessed"),
        ({"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is 'disabled'"),
        ({"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": ""}, "RAY_AUTH_MODE is ''"),
        ({"RAY_AUTH_TOKEN_PATH": "/nonexistent"}, "cannot be read"),
    ],
)
def test_without_a_good_token_nothing_is_started(environment: dict[str, str], message: str) -> None:
    with pytest.raises(launch.Refused, match=message):
        launch.with_token(environment, None)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_token_that_others_can_read_is_refused(token: Path, mode: int) -> None:
    token.chmod(mode)
    with pytest.raises(launch.Refused, match=f"can be read by others .mode {mode:04o}"):
        launch.with_token({}, token)


@pytest.mark.parametrize("command", ["head", "head --host 0.0.0.0", "worker --host :: --address a:1"])
def test_the_command_refuses_every_address_without_a_token(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "darkmatter.launch", *command.split()],
        env={**CLEAN, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "not started without a token" in done.stderr


def test_what_keeps_the_door_shut_cannot_be_undone_behind_the_dashes(token: Path) -> None:
    environment = launch.with_token({}, token)
    for option in ("--dashboard-host=0.0.0.0", "--node-ip-address", "--head", "--temp-dir=/tmp"):
        with pytest.raises(ValueError, match="not for you to set"):
            launch.head(host="127.0.0.1", port=1, dashboard_port=2, environment=environment, more=[option])
    with pytest.raises(ValueError, match="is for one machine"):
        launch.worker(host="127.0.0.1", address="10.0.0.1:6379", environment=environment)


def test_a_folder_that_others_may_have_prepared_is_refused(tmp_path: Path) -> None:
    assert files.private_folder(tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert files.private_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link"):
        with pytest.raises(ValueError, match="not a folder of yours alone"):
            files.private_folder(tmp_path / name)


@pytest.fixture
def head(token: Path) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    port, dashboard = free_port(), free_port()
    command = [sys.executable, "-m", "darkmatter.launch", "head", "--token", str(token), "--port", str(port)]
    command += ["--dashboard-port", str(dashboard), "--", "--num-cpus=1"]
    process = subprocess.Popen(command, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "Ray is up" in first, first + process.stdout.read()
        yield process, port, dashboard
    finally:
        process.terminate()
        process.wait(90)
        process.stdout.close()


@pytest.mark.cluster
def test_a_head_of_this_machine_listens_on_loopback_asks_for_the_token_and_leaves_nothing(
    head: tuple["subprocess.Popen[str]", int, int], token: Path
) -> None:
    import requests

    process, port, dashboard = head
    family = psutil.Process(process.pid).children(recursive=True)
    assert listening(psutil.Process(process.pid)) == {"127.0.0.1"}
    url = f"http://127.0.0.1:{dashboard}/api/jobs/"
    assert requests.get(url).status_code == 401
    assert requests.get(url, headers={"Authorization": f"Bearer {token.read_text()}"}).status_code == 200

    client = {**CLEAN, "RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    probe = "from darkmatter import cluster\nwith cluster.session():\n    import ray\n"
    probe += "    print('answer', ray.get(ray.remote(lambda: 41).remote()))"
    done = subprocess.run([sys.executable, "-c", probe], env=client, capture_output=True, text=True, timeout=120)
    assert "answer 41" in done.stdout, done.stderr

    secret = token.read_text()
    for one in psutil.Process(process.pid).children(recursive=True):
        assert secret not in " ".join(one.cmdline())
        assert secret not in one.environ().values()
    folder = Path(next(part for one in family for part in one.cmdline() if "darkmatter-" in part).split("=")[-1])
    private = next(path for path in (folder, *folder.parents) if path.name.startswith("darkmatter-"))
    assert private.stat().st_mode & 0o777 == 0o700

    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    deadline = time.monotonic() + 20
    while left := [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.cluster
def test_a_session_of_this_machine_listens_on_loopback_in_a_folder_of_its_own() -> None:
    probe = (
        "import psutil\nfrom darkmatter import cluster\n"
        "with cluster.session():\n"
        "    import ray; ray.get(ray.remote(lambda: 41).remote())\n"
        "    family = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "    print({line.laddr.ip.removeprefix('::ffff:') for one in family for line in one.net_connections('inet')"
        " if line.status == 'LISTEN'})\n"
        "    print(ray._private.worker._global_node.get_session_dir_path())"
    )
    done = subprocess.run([sys.executable, "-c", probe], env=CLEAN, capture_output=True, text=True, timeout=180)
    addresses, folder = done.stdout.splitlines()[-2:]
    assert addresses == "{'127.0.0.1'}", done.stderr
    assert Path(folder).parent.parent.stat().st_mode & 0o777 == 0o700
