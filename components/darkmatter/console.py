"""How a stage ends: well, or with a message that a person can act on."""

import sys
from collections.abc import Callable


class Stopped(Exception):
    """A stage ended itself, for a reason that a person can act on: nothing is broken."""


def run(stage: Callable[[], None]) -> None:
    """Runs a stage. A wrong setting, wrong data or a run that stopped itself end it with their message and status 2, all
    else with a traceback."""
    try:
        stage()
    except (ValueError, Stopped) as error:  # ParamsError is one; for our own mistakes there is assert
        print(f"\ndarkmatter: {error}\n", file=sys.stderr)
        sys.exit(2)
