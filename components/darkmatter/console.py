"""How a stage ends: well, or with a message that a person can act on."""

import sys
from collections.abc import Callable


def run(stage: Callable[[], None]) -> None:
    """Runs a stage. A wrong setting or wrong data ends it with its message and status 2, all else with a traceback."""
    try:
        stage()
    except ValueError as error:  # ParamsError is one; for our own mistakes there is assert
        print(f"\ndarkmatter: {error}\n", file=sys.stderr)
        sys.exit(2)
