"""params.yaml -> frozen, typed configs. A key that nothing knows is an error that lists what is known.

Where things run is not what is chosen: the variable DARKMATTER_PLACE names a YAML file whose keys take the place of those
in the section `place`, so that a run moves to another machine without a change of a tracked file.

Beside each component stands its Config (a subclass of `Config` below); this module only reads the file and turns one
section into one Config, so that a stage knows, and depends on, its own sections alone.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from darkmatter.redact import redact

#: Every top-level section of params.yaml, in the order of the pipeline.
SECTIONS = ("source", "ingest", "augment", "objective", "backbone", "pretrain", "evaluate", "register", "place")


class ParamsError(ValueError):
    """What was asked for in params.yaml cannot be done; the message names the key and what is allowed."""


class Config(pydantic.BaseModel):
    """Base of all configs: frozen, keyword-only, unknown keys refused, no silent conversion of types."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


PLACE = "DARKMATTER_PLACE"

ConfigType = TypeVar("ConfigType", bound=Config)


def read(path: str | Path = "params.yaml") -> dict[str, dict[str, Any]]:
    """Reads the file and checks the names of its sections. The section `place` as DARKMATTER_PLACE has it.

    Raises:
        ParamsError: no such file, not YAML, an unknown section, a missing section, a section that is no mapping, or a
            password in an address.
    """
    tree = _yaml(Path(path), "run from the folder that holds it")
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must hold the sections {', '.join(SECTIONS)}")
    for name in tree:
        if name not in SECTIONS:
            raise ParamsError(_unknown(f"{path}: section", str(name), SECTIONS))
    for name in SECTIONS:
        if not isinstance(tree.get(name), dict):
            raise ParamsError(f"{path}: section {name!r} is missing or is not a mapping")
    _refuse_secrets(tree, str(path), "")
    if other := os.environ.get(PLACE):
        tree["place"] |= _place(Path(other), tuple(tree["place"]))
    return tree


def _refuse_secrets(value: Any, file: str, place: str) -> None:
    """The file goes into Git, dvc.lock, MLflow and every version: nothing that it holds stays secret."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_secrets(inner, file, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            _refuse_secrets(inner, file, place)
    elif isinstance(value, str) and redact(value) != value:
        raise ParamsError(
            f"{file}: {place} holds a password or key ({redact(value)}), and the file is committed and logged. Leave it out "
            "of the address: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.netrc for https, MLFLOW_TRACKING_URI or "
            "MLFLOW_TRACKING_PASSWORD"
        )


def _place(path: Path, known: tuple[str, ...]) -> dict[str, Any]:
    changes = _yaml(path, f"{PLACE} names it")
    if not isinstance(changes, dict):
        raise ParamsError(f"{path}, which {PLACE} names, must hold keys of the section place: {', '.join(known)}")
    for name in changes:
        if name not in known:
            raise ParamsError(_unknown(f"{path}: key", str(name), known))
    return changes


def _yaml(path: Path, hint: str) -> Any:
    if not path.is_file():
        raise ParamsError(f"{path} does not exist; {hint}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from error


def parse(config_type: type[ConfigType], values: Mapping[str, Any], *, where: str) -> ConfigType:
    """Turns `values` into a `config_type`; `where` is their dotted place in params.yaml.

    Raises:
        ParamsError: naming every wrong key, what was given and what is allowed.
    """
    try:
        return config_type.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise ParamsError("\n".join(_explain(problem, config_type, where) for problem in error.errors())) from None


def _explain(problem: Any, config_type: type[Config], where: str) -> str:
    *parents, key = problem["loc"] or ("",)
    place = ".".join(str(part) for part in (where, *parents))
    if problem["type"] == "extra_forbidden":
        return _unknown(f"{place}: key", str(key), _keys(config_type, parents))
    if problem["type"] == "missing":
        return f"{place}.{key} is missing"
    return f"{place}.{key}: {problem['msg']} (given: {problem['input']!r})"


def _keys(config_type: type[Config], parents: list[Any]) -> tuple[str, ...]:
    for parent in parents:
        config_type = config_type.model_fields[parent].annotation  # type: ignore[assignment]
    return tuple(config_type.model_fields)


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{what} {name!r} is unknown.{hint} Known: {', '.join(known) or 'none'}."
