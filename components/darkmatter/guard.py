"""Looks at hostile bytes in a process that may die of them.

The process has a limit of memory and of time, may not write files, and answers in JSON: nothing that it says is
unpickled. As a program: `python -m darkmatter.guard MAX_PIXELS MEBIBYTES`, with a socket as standard input.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys

from darkmatter import images

_LENGTH = struct.Struct(">Q")
_LONGEST = 2**16  # bytes of an answer


@dataclasses.dataclass(frozen=True)
class Limits:
    max_pixels: int
    seconds: float
    mebibytes: int


class Guard:
    """One such process, started again whenever it died."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def inspect(self, content: bytes) -> images.Inspection:
        """`images.inspect` of the bytes.

        Raises:
            Rejected: as it does; or `too-slow`, `too-much-memory`, `killed-the-decoder`.
        """
        line = self._started()
        try:
            line.sendall(_LENGTH.pack(len(content)) + content)
            (length,) = _LENGTH.unpack(_receive(line, _LENGTH.size))
            return _understood(_receive(line, length) if length <= _LONGEST else b"")
        except _Nonsense:
            self.close()
            raise images.Rejected("killed-the-decoder", "the process that decoded it answered nonsense") from None
        except TimeoutError:
            self.close()
            raise images.Rejected("too-slow", f"not decoded after {self.limits.seconds} s") from None
        except ConnectionError:
            code = self._process.wait() if self._process else 0
            self.close()
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            raise images.Rejected("killed-the-decoder", f"the process that decoded it ended with {how}") from None

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._line = self._process = None

    def _started(self) -> socket.socket:
        if self._line is None:
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", __name__, str(self.limits.max_pixels), str(self.limits.mebibytes)]
                environment = {
                    "PATH": os.environ.get("PATH", ""),
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OPENBLAS_NUM_THREADS": "1",  # each thread takes address space, which is limited
                }
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment
                )
            self._line = ours
            self._line.settimeout(60.0)
            _receive(ours, 1)  # it is there: starting counts as nobody's decoding time
            self._line.settimeout(self.limits.seconds)
        return self._line


class _Nonsense(Exception):
    """No answer of ours: an image may have taken the process over."""


def _understood(answer: bytes) -> images.Inspection:
    """What it says becomes part of names of files, and of lists."""
    try:
        match json.loads(answer):
            case {"reason": str(reason), "detail": str(detail)} if re.fullmatch("[a-z-]{1,40}", reason):
                raise images.Rejected(reason, detail)
            case {"extension": str(name), "fingerprint": None | int() as seen} if re.fullmatch("[a-z]{1,5}", name):
                if seen is None or -(2**63) <= seen < 2**63:
                    return images.Inspection(extension=name, fingerprint=seen)
    except (ValueError, RecursionError):
        pass
    raise _Nonsense


def _receive(line: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = line.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionResetError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def main() -> None:
    max_pixels, mebibytes = map(int, sys.argv[1:])
    images.load_decoders()
    resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive who asked
    with socket.socket(fileno=0) as line, contextlib.suppress(ConnectionError):
        line.sendall(b"!")
        while True:
            (length,) = _LENGTH.unpack(_receive(line, _LENGTH.size))
            content = _receive(line, length)
            try:
                answer = dataclasses.asdict(images.inspect(content, max_pixels=max_pixels))
            except images.Rejected as rejected:
                answer = {"reason": rejected.reason, "detail": rejected.detail[:4000]}
            reply = json.dumps(answer).encode()
            line.sendall(_LENGTH.pack(len(reply)) + reply)


if __name__ == "__main__":
    main()
