"""`python -m darkmatter.launch`: Ray on this machine, never without a token.

token FILE     writes a new token, readable by its owner only
head           starts the first machine of a cluster; without --host it is for this machine alone
worker         joins a machine to the head at --address

In the foreground, so that a service manager or a terminal holds it; SIGTERM or Ctrl-C ends it and all that it started,
and nothing else (`ray stop` ends every Ray of the machine). `ray start` is a child and not what this process becomes: it
answers SIGTERM with status 1, which service managers take for a failure, and it does not look at what it listens on.
What stands behind `--` goes to `ray start`: `-- --num-gpus=4`.
"""

import argparse
import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from darkmatter import console, files

_SHORTEST = 32  # characters of a token; ours have 64
_START, _STOP = 180.0, 60.0  # seconds; Ray takes up to 30 to hand over what runs on a machine that leaves
#: Processes of every machine; each opens its ports when it comes.
_PARTS = {"raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
_ALL = ("0.0.0.0", "::")
_LOOPBACK = ("127.0.0.1", "localhost")
_OURS = ("--head", "--address", "--port", "--node-ip-address", "--dashboard-host", "--dashboard-port", "--block",
         "--temp-dir", "--system-config", "--redis-password")  # fmt: skip


class Refused(ValueError):
    """Ray was not started, because strangers could have used it."""


def new_token(path: Path) -> None:
    """Writes a token that nobody has, in a file that only its owner reads.

    Raises:
        Refused: there is a file already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise Refused(f"{path} is there already; whoever uses its token would be shut out") from error
    with os.fdopen(handle, "w") as file:
        os.fchmod(handle, 0o600)  # whatever the umask
        file.write(secrets.token_hex(32))


def with_token(environment: Mapping[str, str], path: Path | None) -> dict[str, str]:
    """The environment in which Ray asks everyone for a token. It holds the path of the token rather than the token, where
    there is one: an environment is printed more easily than a file.

    Args:
        environment: perhaps with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. Else ~/.ray/auth_token is looked for, as Ray does.
        path: of the token; wins over all.

    Raises:
        Refused: no token, a weak one, one that others can read, or RAY_AUTH_MODE says something else than `token`.
    """
    mode = environment.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise Refused(
            f"RAY_AUTH_MODE is {mode!r}: whoever reaches a port of Ray could run code. Unset it, or set token"
        )
    kept = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH_TOKEN")}
    usual = Path(environment.get("HOME", "/nonexistent")) / ".ray" / "auth_token"
    if path is None and not environment.get("RAY_AUTH_TOKEN"):
        named = environment.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named) if named else usual if usual.exists() else None
    if path is None:
        _check_strength(environment.get("RAY_AUTH_TOKEN", ""), "RAY_AUTH_TOKEN")
        return {**kept, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": environment["RAY_AUTH_TOKEN"]}
    _check_strength(_read_private(path), str(path))
    return {**kept, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(path.resolve())}


def _read_private(path: Path) -> str:
    try:
        with path.open() as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
                raise Refused(
                    f"{path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o}); chmod 600 {path}, and make "
                    "a new token if others are on this machine"
                )
            if found.st_uid not in (0, os.geteuid()):
                raise Refused(f"{path} belongs to another user (uid {found.st_uid}), who knows the token then")
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the token {path} cannot be read ({error}); python -m darkmatter.launch token {path}") from error


def _check_strength(token: str, where: str) -> None:
    if not token:
        raise Refused(
            "Ray is not started without a token: python -m darkmatter.launch token FILE writes one, then give --token "
            "FILE, or set RAY_AUTH_TOKEN_PATH, here and wherever it is used"
        )
    if len(token) < _SHORTEST:
        raise Refused(f"the token in {where} has {len(token)} characters and could be guessed; {_SHORTEST} at least")


def head(*, host: str, port: int, dashboard_port: int, environment: Mapping[str, str], more: Sequence[str] = ()) -> int:
    """Runs the first machine of a cluster until SIGTERM or SIGINT. Returns the status to exit with.

    Args:
        host: address of this machine that others reach; on 127.0.0.1 nobody else does. 0.0.0.0: whichever Ray finds, and the
            dashboard on all.
        port: of Ray.
        dashboard_port: of the dashboard, which also takes jobs.
        environment: from `with_token`.
        more: for `ray start`.

    Raises:
        Refused: a port would be open to other machines although the host is 127.0.0.1.
        ValueError: Ray did not start, or an option in `more` is not for it to set.
    """
    alone = host in _LOOPBACK
    host = "127.0.0.1" if alone else host
    options = ["--head", f"--port={port}", f"--dashboard-host={host}"]
    options += [] if host in _ALL else [f"--node-ip-address={host}"]
    # ray:// cannot be left away; whichever port it gets, it asks for the token.
    options += [f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={_free_port()}"]
    if alone:
        # Else Ray takes the machine's own address instead of 127.0.0.1, and listens on all (measured with 2.60).
        environment = {**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    token = environment.get("RAY_AUTH_TOKEN_PATH")
    told = (
        f"Ray is up at {host}:{port}{' (this machine only)' if alone else ''}, dashboard http://{host}:{dashboard_port}"
    )
    told += f"\nuse it with: RAY_ADDRESS={host}:{port} RAY_AUTH_MODE=token"
    told += f" RAY_AUTH_TOKEN_PATH={token}" if token else " and its RAY_AUTH_TOKEN"
    near = "127.0.0.1" if host in _ALL else host
    return _hold(options, more, environment, told, ports=[(near, port), (near, dashboard_port)], alone=alone)


def worker(*, host: str, address: str, environment: Mapping[str, str], more: Sequence[str] = ()) -> int:
    """Runs a further machine of the cluster at `address` until SIGTERM or SIGINT. Otherwise as `head`."""
    if host in _LOOPBACK or address.rpartition(":")[0] in _LOOPBACK:
        raise ValueError(
            "a head on 127.0.0.1 is for one machine; start it with --host and an address that others reach"
        )
    options = [f"--address={address}", f"--node-ip-address={host}"]
    return _hold(options, more, environment, f"this machine works for Ray at {address}", ports=[], alone=False)


def _hold(
    options: Sequence[str],
    more: Sequence[str],
    environment: Mapping[str, str],
    told: str,
    *,
    ports: Sequence[tuple[str, int]],
    alone: bool,
) -> int:
    for option in more:
        if option.partition("=")[0] in _OURS:
            raise ValueError(f"{option} behind -- is not for you to set; see python -m darkmatter.launch --help")
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    # Ray opens its folders to all users of the machine, and the code of jobs lies in them.
    command.append(f"--temp-dir={files.own_temporary() / 'ray'}")
    # A fixed port for the agent would keep a second Ray from this machine.
    command += ["--dashboard-agent-listen-port=0", *options, *more]
    with tempfile.TemporaryFile() as log, _asked_to_stop() as asked:
        ray = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,  # thirty lines of advice, `ray stop` among it
            stderr=subprocess.STDOUT,
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
            start_new_session=True,  # Ctrl-C comes to us
            preexec_fn=_end_with_parent,  # noqa: PLW1509  # this process has one thread
        )
        try:
            if _wait_until_up(ray, ports, asked, log):
                if alone:
                    _check_alone(ray)
                print(told, flush=True)
            while ray.poll() is None and not asked:
                time.sleep(0.2)
            if not asked:
                raise ValueError(f"Ray ended by itself with status {ray.returncode}: {_last_words(log)}")
        finally:
            _end(ray)
    return 0


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals that came; the first one asks."""
    came: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: also when we are killed


def _wait_until_up(
    ray: "subprocess.Popen[bytes]", ports: Sequence[tuple[str, int]], asked: Sequence[int], log: BinaryIO
) -> bool:
    """Whether it is; not when it was asked to stop first."""
    deadline = time.monotonic() + _START
    while not asked:
        if ray.poll() is not None:
            raise ValueError(f"Ray did not start: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise ValueError(f"Ray did not start within {_START:.0f} s: {_last_words(log)}")
        if {name for name, _ in _listening(ray)} >= _PARTS and all(_answers(*one) for one in ports):
            return True
        time.sleep(0.2)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


def _check_alone(ray: "subprocess.Popen[bytes]") -> None:
    """The switch that keeps Ray on 127.0.0.1 is one that another version may not know."""
    found = [f"{name} on {line.ip}:{line.port}" for name, line in _listening(ray)]
    found = [text for text in found if not re.search(r" on (::ffff:)?127\.0\.0\.1:", text)]
    if found:
        raise Refused(f"this Ray does not keep to 127.0.0.1 ({', '.join(found)}); give --host if that is meant")


def _listening(ray: "subprocess.Popen[bytes]") -> list[tuple[str, Any]]:
    """(name of the process, address) of every port."""
    found = []
    for one in _family(ray):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            name, lines = one.name(), one.net_connections("inet")
            found += [(name, line.laddr) for line in lines if line.status == psutil.CONN_LISTEN]
    return found


def _family(ray: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    try:
        return psutil.Process(ray.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(ray: "subprocess.Popen[bytes]") -> None:
    """With all that came of it."""
    family = _family(ray)
    ray.terminate()
    try:
        ray.wait(_STOP)
    except subprocess.TimeoutExpired:
        ray.kill()
        ray.wait()
    _, left = psutil.wait_procs(family, timeout=5.0)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def _last_words(log: BinaryIO) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 1500))
    return log.read().decode(errors="replace").strip()


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, more = _parser().parse_args(arguments[:cut]), arguments[cut + 1 :]
    if chosen.command == "token":
        new_token(chosen.file)
        print(f"{chosen.file}: a new token; copy it to every machine and client of the cluster")
        return 0
    environment = with_token(os.environ, chosen.token)
    if chosen.command == "worker":
        return worker(host=chosen.host, address=chosen.address, environment=environment, more=more)
    ports = {"port": chosen.port, "dashboard_port": chosen.dashboard_port}
    return head(host=chosen.host, environment=environment, more=more, **ports)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m darkmatter.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("token", help="write a new token").add_argument("file", type=Path)
    first = commands.add_parser("head", help="the first machine")
    first.add_argument("--host", default="127.0.0.1", help="address that others reach; default: 127.0.0.1, nobody does")
    first.add_argument("--port", type=int, default=6379)
    first.add_argument("--dashboard-port", type=int, default=8265)
    other = commands.add_parser("worker", help="a further machine")
    other.add_argument("--host", required=True, help="address of this machine that the others reach")
    other.add_argument("--address", required=True, help="HOST:PORT of the head")
    for command in (first, other):
        command.add_argument("--token", type=Path, help="file of the token; default: as Ray looks for it")
    return parser


if __name__ == "__main__":
    console.run(lambda: sys.exit(main(sys.argv[1:])))
