"""A name in params.yaml is a module in a folder. The file is the registration.

A folder of plugins is a sub-package of darkmatter (`objectives`, `sources`, ...). Every module in it whose name does
not start with an underscore is a plugin; what it must define is said in the folder's `__init__.py`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from darkmatter.params import Config, ParamsError, parse

_PACKAGE = Path(__file__).parent


def names(folder: str) -> list[str]:
    """The plugins in `folder`, sorted. Reads the directory only: nothing is imported."""
    modules = pkgutil.iter_modules([str(_PACKAGE / folder)])
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def check_name(folder: str, name: str, *, where: str) -> None:
    """Raises ParamsError, with the list of what there is, when `folder` has no plugin `name`."""
    known = names(folder)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ParamsError(f"{where}: there is no {name!r} in {folder}/.{hint} There is: {', '.join(known)}.")


def load(folder: str, name: str, *, where: str) -> ModuleType:
    """Imports the plugin `name` of `folder`.

    Raises:
        ParamsError: there is no such plugin; `where` is the key in params.yaml that asked for it.
    """
    check_name(folder, name, where=where)
    return importlib.import_module(f"darkmatter.{folder}.{name}")


def choose(folder: str, section: Mapping[str, Any], *, where: str) -> tuple[ModuleType, Config]:
    """The module that `section["name"]` names, and its Config from the options under that same name.

    A section reads `{name: simclr, simclr: {temperature: 0.2}, vicreg: {...}}`: to switch is to change one word, and
    what is set for the others waits for them.

    Raises:
        ParamsError: no name, an unknown name anywhere in the section, or an unknown option of the chosen one.
    """
    if "name" not in section:
        raise ParamsError(f"{where}.name is missing. There is: {', '.join(names(folder))}.")
    for key in (section["name"], *section):
        if key != "name":
            check_name(folder, key, where=f"{where}.name" if key == section["name"] else where)
    module = load(folder, section["name"], where=f"{where}.name")
    return module, options(module, section, where=where)


def options(module: ModuleType, section: Mapping[str, Any], *, where: str) -> Config:
    """The module's Config from its entry in `section`; its defaults where there is none."""
    name = module.__name__.rpartition(".")[2]
    return parse(module.Config, section.get(name) or {}, where=f"{where}.{name}")
