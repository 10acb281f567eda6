"""`python -m darkmatter.registry`: look at the registered model of params.yaml, promote, go back, delete, verify, fetch,
reproduce."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darkmatter import console, params, registry
from darkmatter.registry import aliases, reproduce


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a mistake ends it with a message and status 2, as in every stage."""
    chosen = _parser().parse_args(arguments)
    tree = params.read()
    name = params.parse(registry.RegisterConfig, tree["register"], where="register").model
    registry.connect(tree["place"]["mlflow"])
    from mlflow.exceptions import MlflowException

    try:
        if chosen.command == "reproduce":
            _reproduce(name, chosen.version, tree["place"], chosen.folder)
        else:
            _do(name, chosen)
    except MlflowException as error:
        raise ValueError(f"MLflow: {error.message}") from error


def _do(name: str, chosen: argparse.Namespace) -> None:
    if chosen.command == "history":
        for change in aliases.history(name):
            moved = f"{change.before or '-'} -> {change.after or '-'}"
            print(
                f"{change.time[:19]}Z  {change.action:<9} {change.alias:<10} {moved:<10} {change.who}: {change.reason}"
            )
    elif chosen.command == "promote":
        aliases.promote(name, chosen.version, reason=chosen.reason)
        print(f"{name} version {chosen.version} is the champion")
    elif chosen.command == "rollback":
        version = aliases.rollback(name, reason=chosen.reason)
        print(f"{name} version {version} is the champion again")
    elif chosen.command == "delete":
        aliases.delete(name, chosen.version, reason=chosen.reason)
        print(f"{name} version {chosen.version} is deleted")
    elif chosen.command == "verify":
        aliases.verify(name, chosen.version, public_key=chosen.public_key)
        signed = f", signed for {chosen.public_key}" if chosen.public_key else ""
        print(f"{name} version {chosen.version} is what was registered{signed}")
    else:
        if chosen.folder.exists():
            raise ValueError(f"{chosen.folder} is there already; name a new folder")
        registry.fetch(f"models:/{name}/{chosen.version}", chosen.folder, public_key=chosen.public_key)
        print(f'{chosen.folder}: verified; mlflow.pyfunc.load_model("{chosen.folder}")')


def _reproduce(name: str, version: str, place: Mapping[str, Any], folder: Path | None) -> None:
    """In a folder that was named, which stays; or in one that stays only when the answer is no."""
    if folder is not None and folder.exists():
        raise ValueError(f"{folder} is there already; name a new folder")
    made, stays = folder or Path(tempfile.mkdtemp(prefix="darkmatter-reproduce-")), folder is not None
    try:
        print(reproduce.reproduce(name, version, place, folder=made))
    except reproduce.NotReproduced as error:
        if not (made / "repository").exists():
            raise
        stays = True
        raise reproduce.NotReproduced(f"{error}\nWhat was rebuilt is in {made}") from error
    finally:
        if not stays:
            shutil.rmtree(made, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m darkmatter.registry", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("history", help="every change of an alias, oldest first")
    promote = commands.add_parser("promote", help="verify a version and make it champion")
    rollback = commands.add_parser("rollback", help="make the champion before this one champion again")
    delete = commands.add_parser("delete", help="delete a version that is not champion")
    verify = commands.add_parser("verify", help="prove that a version is what was registered")
    load = commands.add_parser("load", help="a verified copy of a version in a new folder")
    again = commands.add_parser("reproduce", help="train a version again from its commit; are the weights equal?")
    again.add_argument("--folder", type=Path, help="a new one to rebuild in, which stays; else a temporary one")
    for command in (promote, delete, verify, load, again):
        command.add_argument("version")
    for command in (promote, rollback, delete):
        command.add_argument("--reason", default="by hand", help="kept in the history")
    for command in (verify, load):
        command.add_argument("--public-key", type=Path, help="PEM file: the version must be signed by its private half")
    load.add_argument("folder", type=Path)
    return parser


if __name__ == "__main__":
    console.run(lambda: main(sys.argv[1:]))
