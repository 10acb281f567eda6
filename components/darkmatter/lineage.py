"""What something was made from: code, params, data, commit.

A fingerprint names a training run. Equal inputs give an equal name, so that a killed run finds its checkpoints; any
change in the code it runs, its params or its data gives a new name, so that no run resumes from what is not its own.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent


def imported_files(entry: Path) -> set[Path]:
    """The darkmatter files that `entry` imports, directly or through others, function-level imports included.

    Plugins are loaded by name and are therefore not in it: pass their files as entries of their own.
    """
    found: set[Path] = set()
    pending = [entry.resolve()]
    while pending:
        for path in _imports(pending.pop()):
            if path not in found:
                found.add(path)
                pending.append(path)
    return found


@functools.cache
def _imports(path: Path) -> frozenset[Path]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    files: set[Path] = set()
    for module in modules:
        parts = module.split(".")
        if parts[0] != "darkmatter":
            continue
        for depth in range(1, len(parts) + 1):  # importing a.b.c runs a/__init__ and a/b/__init__ too
            base = _ROOT.joinpath(*parts[:depth])
            files.update(file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())
    return frozenset(files)


def code_digest(entries: Iterable[Path]) -> str:
    """Digest of the code that the entries run. Comments and layout do not count: they change no result."""
    files = {entry.resolve() for entry in entries}
    files |= {path for entry in files for path in imported_files(entry)}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + ast.dump(ast.parse(path.read_bytes())).encode() + b"\0")
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex characters over JSON-serialisable parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


#: Files that decide results. Data, metrics, pictures and dvc.lock are what a run itself changes.
_DECIDES = ("components", "pipelines", "dvc.yaml", "params.yaml", "requirements.lock")


def git_commit() -> dict[str, Any]:
    """{"commit": 40 hex digits or None outside a repository, "dirty": files of code and params that differ from it}.

    From the folder of the repository. Files that Git does not know yet count: a new plugin decides results too.
    """
    status_command = ["git", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *_DECIDES]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run(status_command, capture_output=True, text=True, check=True).stdout
    except (subprocess.CalledProcessError, FileNotFoundError):
        return {"commit": None, "dirty": []}
    return {"commit": commit, "dirty": [entry[3:] for entry in status.split("\0") if entry]}


def versions() -> dict[str, str]:
    """The versions of the libraries that decide numbers, and Python's."""
    names = ("torch", "timm", "ray", "numpy", "pillow", "simplejpeg", "opencv-python-headless")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
