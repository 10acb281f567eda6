"""Two hosts on this machine: network namespaces with a line between them that can be cut."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence


class Hosts:
    """`first` and `second` are the addresses; a command with `on(0)` or `on(1)` before it runs there."""

    def __init__(self) -> None:
        self._names = [f"dm{os.getpid()}-{number}" for number in (0, 1)]
        self.first, self.second = "10.213.77.1", "10.213.77.2"

    def on(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self._names[host]]

    def cut(self) -> None:
        self._ip("-n", self._names[1], "link", "set", "line", "down")

    def heal(self) -> None:
        self._ip("-n", self._names[1], "link", "set", "line", "up")

    def up(self) -> None:
        for name in self._names:
            self._ip("netns", "add", name)
        # In one step: an interface that is made first and moved then has a name here for a moment.
        ends = [["name", "line", "netns", name] for name in self._names]
        self._ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self._names, (self.first, self.second), strict=True):
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "line")
            for device in ("lo", "line"):
                self._ip("-n", name, "link", "set", device, "up")

    def down(self) -> None:
        for name in self._names:
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", name)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two() -> Iterator[Hosts | None]:
    """None where the machine does not allow it: no `ip`, or no right to make namespaces."""
    hosts = Hosts()
    try:
        if shutil.which("ip") is None:
            yield None
            return
        try:
            hosts.up()
        except subprocess.CalledProcessError:
            yield None
            return
        yield hosts
    finally:
        if shutil.which("ip"):
            hosts.down()


def without(folder: str, command: Sequence[str]) -> list[str]:
    """The command where a folder of this machine is empty, as on a host that does not share it."""
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder, *command]
