"""How a stage ends: well, or with a message that a person can act on."""

import errno
import sys
from collections.abc import Callable

from darkmatter.redact import Redacting

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(Exception):
    """A stage ended itself, for a reason that a person can act on: nothing is broken."""


class Preempted(Exception):
    """A stage was asked to stop before its end, and what it did is saved: to run it again goes on."""


def run(stage: Callable[[], None]) -> None:
    """Runs a stage. What it prints shows no password of an address, nor does a traceback.

    A wrong setting, wrong data, a full disk or a run that stopped itself end it with their message and status 2, one that
    was asked to stop with 75 (EX_TEMPFAIL of sysexits.h: try again), all else with a traceback.
    """
    sys.stdout, sys.stderr = Redacting(sys.stdout), Redacting(sys.stderr)  # type: ignore[assignment]
    try:
        stage()
    except Preempted as error:
        _end(str(error), status=75)
    except (ValueError, Stopped) as error:  # ParamsError is one; for our own mistakes there is assert
        _end(str(error))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _end(f"the disk is full: {error}. What was there before is still there; make room and run it again")


def _end(message: str, *, status: int = 2) -> None:
    print(f"\ndarkmatter: {message}\n", file=sys.stderr)
    sys.exit(status)
