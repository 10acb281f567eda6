"""One run of pretraining as its driver and its workers share it: a name, an address, and short messages in files there."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from darkmatter import cluster, remote
from darkmatter.console import Stopped
from darkmatter.training.checkpoint import Checkpoints

_STOPPED = "stopped.txt"  # why the run ended itself: to run it again would end the same way
_ASKED = "asked-to-stop"  # by the driver, who was asked by a signal
_LOOK_EVERY = 1.0  # seconds between two looks of a worker at that


@dataclasses.dataclass
class Run:
    address: str
    """Where its files lie; an absolute path, since workers have a folder of their own."""
    place: cluster.PlaceConfig
    session: float = dataclasses.field(default_factory=time.time)
    """When this call of the stage began, seconds since 1970."""

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.address, keep=self.place.keep_checkpoints)
        self.asked = False
        """Whether the driver was asked to stop."""
        self._looked = 0.0

    @classmethod
    def of(cls, fingerprint: str, place: cluster.PlaceConfig) -> "Run":
        """For the driver: the run of this fingerprint in `place.storage`."""
        storage = place.storage if remote.is_remote(place.storage) else str(Path(place.storage).resolve())
        return cls(remote.join(storage, f"pretrain-{fingerprint}"), place)

    def stop(self, reason: Stopped) -> None:
        """The run ends, for good."""
        remote.write(self._file(_STOPPED), str(reason).encode())

    def stopped(self) -> str:
        """Why, if so."""
        if not remote.exists(self._file(_STOPPED)):
            return ""
        reason = remote.read(self._file(_STOPPED), limit=2**20).decode()
        return (
            f"{reason}. Same code, params and data end here again; to try all the same, remove {self._file(_STOPPED)}"
        )

    def asked_to_stop(self) -> bool:
        """For a worker; looks at most once a second. A store that is away has not asked."""
        now = time.monotonic()
        if not self.asked and now - self._looked > _LOOK_EVERY:
            self._looked = now
            with contextlib.suppress(remote.Unreadable):
                self.asked = remote.exists(self._file(_ASKED))
        return self.asked

    @contextlib.contextmanager
    def stopping_at_sigterm(self) -> Iterator[None]:
        """Within the block SIGTERM, which announces the end of a machine or a job, makes the workers save and return."""

        def ask(number: int, frame: object) -> None:
            print("darkmatter: asked to stop; saving", file=sys.stderr, flush=True)
            self.asked = True
            remote.write(self._file(_ASKED), b"")

        remote.remove(self._file(_ASKED))  # of an earlier call
        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            remote.remove(self._file(_ASKED))

    def _file(self, name: str) -> str:
        return remote.join(self.address, name)
