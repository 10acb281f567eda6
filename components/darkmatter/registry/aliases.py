"""Which version an alias names, how that changed, and who may be deleted.

MLflow keeps no history of an alias. Each change is a tag of the registered model, `history.TIME.ALIAS`, that is never
changed: tags of different names cannot overwrite each other, whoever writes at the same time.
"""

import dataclasses
import datetime
import getpass
import json
import os
from typing import Any

from darkmatter import registry

_PREFIX = "history."


class Refused(ValueError):
    """What was asked for would leave users of the registry without a model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One change of an alias, or a deletion (`alias` is empty then)."""

    time: str
    """ISO 8601, UTC."""
    action: str
    """`register`, `promote`, `rollback` or `delete`."""
    alias: str
    before: str | None
    """The version it named."""
    after: str | None
    """The version it names now."""
    who: str
    reason: str


def history(name: str) -> list[Change]:
    """All changes of the registered model `name`, oldest first.

    Raises:
        mlflow.exceptions.MlflowException: there is no such model.
    """
    import mlflow

    tags = mlflow.MlflowClient().get_registered_model(name).tags
    return [Change(**json.loads(text)) for key, text in sorted(tags.items()) if key.startswith(_PREFIX)]


def move(name: str, alias: str, version: str, *, action: str, reason: str) -> None:
    """Points an alias at a version and records it; nothing happens when it points there already."""
    import mlflow

    current = registry.find(name, alias=alias)
    before = str(current.version) if current is not None else None
    if before == version:
        return
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
    _record(name, action=action, alias=alias, before=before, after=version, reason=reason)


def promote(name: str, version: str, *, reason: str) -> None:
    """Makes a version champion, by a person's decision, after it was verified file by file.

    Raises:
        ValueError: the version has no seal.
        seal.Broken: it is not what was registered.
        mlflow.exceptions.MlflowException: there is no such version.
    """
    verify(name, version)
    move(name, "champion", version, action="promote", reason=reason)


def rollback(name: str, *, reason: str) -> str:
    """Makes the version champion again that was it before. Once more goes back one more. Returns the version.

    Nothing is downloaded: a rollback is for when it must be quick, and who loads a version verifies it.

    Raises:
        Refused: there is no champion before this one, or it was deleted.
    """
    there = _versions(name)
    champions: list[str] = []
    for change in history(name):
        if change.alias == "champion" and change.after is not None:
            if change.action == "rollback":
                champions = champions[: _last(champions, change.after) + 1]
            else:
                champions.append(change.after)
    current = registry.find(name, alias="champion")
    if current is not None and champions[-1:] != [str(current.version)]:
        champions.append(str(current.version))  # moved by other tools than ours, or by one that died before it wrote so
    earlier = [version for version in champions[:-1] if version in there]
    if not earlier:
        raise Refused(f"{name} has no champion before this one that is still there; see the history")
    move(name, "champion", earlier[-1], action="rollback", reason=reason)
    return earlier[-1]


def delete(name: str, version: str, *, reason: str) -> None:
    """Deletes a version, for good.

    Raises:
        Refused: it is the champion, or there is no such version.
    """
    import mlflow

    there = _versions(name)
    if version not in there:
        raise Refused(f"{name} has no version {version} (there is: {', '.join(there) or 'none'})")
    current = registry.find(name, alias="champion")
    if current is not None and str(current.version) == version:
        raise Refused(f"{name} version {version} is the champion; promote another one first, or roll back")
    mlflow.MlflowClient().delete_model_version(name, version)
    _record(name, action="delete", alias="", before=version, after=None, reason=reason)


def verify(name: str, version: str, **options: Any) -> None:
    """Proves that a version is what was registered; raises as `registry.fetch` does."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        registry.fetch(f"models:/{name}/{version}", Path(folder, "version"), **options)


def _last(champions: list[str], version: str) -> int:
    return max(index for index, one in enumerate(champions) if one == version)


def _versions(name: str) -> list[str]:
    import mlflow

    found = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    return sorted((str(one.version) for one in found), key=int)


def _record(name: str, **change: Any) -> None:
    import mlflow

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    made = Change(time=now, who=_who(), **change)
    key = f"{_PREFIX}{now.replace(':', '-').replace('+00-00', 'Z')}.{made.alias or 'version'}"
    mlflow.MlflowClient().set_registered_model_tag(name, key, json.dumps(dataclasses.asdict(made)))


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return str(os.getuid())
