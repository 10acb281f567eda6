"""The reference tests notice when a term is negated or dropped: they are not hollow."""

import json
import subprocess
import sys
from pathlib import Path

#: One of each mechanism against collapse.
FAMILIES = ("simclr", "vicreg", "byol", "swav", "mae", "vae")


def test_no_mutant_of_a_term_survives() -> None:
    command = [sys.executable, str(Path(__file__).with_name("mutate.py")), *FAMILIES]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["tried"] >= 2 * len(FAMILIES)
    assert found["alive"] == []
