"""Runs a script as if only some requirements were installed: `python tests/fresh.py REQUIREMENTS SCRIPT ARGUMENTS ...`.

Every module of a distribution that is not among them, or needed by them, cannot be imported. REQUIREMENTS is a
requirements.txt, or a script with its own (PEP 723). The last line of the output says how many distributions that makes.
"""

import importlib.metadata as metadata
import re
import runpy
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def main(requirements: str, script: str, *arguments: str) -> None:
    allowed = needed(read(Path(requirements)))
    sys.meta_path[:] = [Fresh(finder, allowed) for finder in sys.meta_path]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    present = {name.partition(".")[0] for name in sys.modules}
    assert "darkmatter" not in present
    print(len(allowed), "distributions")


def read(path: Path) -> list[str]:
    text = path.read_text()
    if path.suffix == ".txt":
        return text.splitlines()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)
    assert block, f"{path} has no requirements"
    return tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))["dependencies"]


def needed(requirements: list[str]) -> set[str]:
    """The names of all distributions that an installer would bring."""
    allowed: set[str] = set()
    seen: set[tuple[str, str]] = set()
    pending = [(Requirement(line.strip()), "") for line in requirements]
    while pending:
        one, extra = pending.pop()
        for wanted in ("", *one.extras) if one.marker is None or one.marker.evaluate({"extra": extra}) else ():
            if (_name(one.name), wanted) not in seen:
                seen.add((_name(one.name), wanted))
                allowed.add(_name(one.name))
                pending += [(Requirement(text), wanted) for text in metadata.requires(one.name) or []]
    return allowed


class Fresh:
    """A finder that does not know what an environment of the requirements alone would not have."""

    owners = metadata.packages_distributions()

    def __init__(self, finder: object, allowed: set[str]) -> None:
        self.finder, self.allowed = finder, allowed

    def __getattr__(self, name: str) -> object:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        top = name.partition(".")[0]
        found = None if top == "darkmatter" else self.finder.find_spec(name, path, target)  # type: ignore[attr-defined]
        owned = self.owners.get(top)
        if found is None or not owned or any(_name(one) in self.allowed for one in owned):
            return found
        # Ray brings a psutil of its own along.
        return found if "thirdparty_files" in str(found.origin) else None


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


if __name__ == "__main__":
    main(*sys.argv[1:])
