"""How a stage ends: well, or with a message that a person can act on."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from darkmatter.redact import Redacting, redact

#: Names a file, for who runs stages through DVC, which keeps neither status nor message: {"stage", "status", "message"}.
ENDING = "DARKMATTER_ENDING"
TRY_AGAIN = os.EX_TEMPFAIL
"""Exit status, 75, of what was asked to stop and would go on."""
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a job lets DVC ignore it, and what DVC starts inherits that
    sys.stdout, sys.stderr = Redacting(sys.stdout), Redacting(sys.stderr)  # type: ignore[assignment]
    try:
        stage()
    except Preempted as error:
        _end(str(error), status=TRY_AGAIN)
    except (ValueError, Stopped) as error:  # ParamsError is one; for our own mistakes there is assert
        _end(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            _end(f"the disk is full: {error}. What was there before is still there; make room and run it again")
        _note(f"{type(error).__name__}: {error}", status=1)
        raise


def _end(message: str, *, status: int = 2) -> None:
    print(f"\ndarkmatter: {message}\n", file=sys.stderr)
    _note(message, status)
    sys.exit(status)


def _note(message: str, status: int) -> None:
    if path := os.environ.get(ENDING):
        ending = {"stage": os.environ.get("DVC_STAGE", ""), "status": status, "message": redact(message)}
        Path(path).write_text(json.dumps(ending))
