"""Writes docs/params.md from the Configs: `make docs`. A test fails when the page is stale."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

from darkmatter import plugin
from darkmatter.params import Config

HERE = Path(__file__).parent
_SECTIONS = {
    "source": "darkmatter.sources.SourceConfig",
    "ingest": "darkmatter.ingest.IngestConfig",
    "augment": "darkmatter.training_set.AugmentConfig",
    "augment.views": "augmentations",
    "objective": "objectives",
    "backbone": "backbones",
    "pretrain": "darkmatter.training.PretrainConfig",
    "evaluate": "evaluations",
    "register": "darkmatter.registry.RegisterConfig",
    "place": "darkmatter.cluster.PlaceConfig",
}
_HEAD = """# Every key of params.yaml

Made by `make docs` from the code; do not edit. An unknown key is refused with the list of known ones.

A section with a `name` chooses a file of a folder. Options stand under that name (`objective: {name: simclr, simclr:
{temperature: 0.2}}`), so that switching is one word; where there are none, the defaults below hold, which are the paper's.
"""


def page() -> str:
    parts = [_HEAD]
    for section, target in _SECTIONS.items():
        if "." in target:
            module, _, name = target.rpartition(".")
            config = getattr(importlib.import_module(module), name)
            parts.append(f"## {section}\n\n{_table(config)}")
            continue
        key = "" if section == "evaluate" else f"`name`: one of {', '.join(plugin.names(target))}.\n\n"
        if section == "evaluate":
            key = "`seed`: of the episodes. Every other key runs the evaluation of that name.\n\n"
        parts.append(f"## {section}\n\n{key}".rstrip() + "\n")
        for name in plugin.names(target):
            module = importlib.import_module(f"darkmatter.{target}.{name}")
            about = inspect.getdoc(module).split("\n\n")[0].replace("\n", " ")
            parts.append(f"### {section}.{name}\n\n{about}\n\n{_table(module.Config)}")
    return "\n".join(parts)


def _table(config: type[Config]) -> str:
    if not config.model_fields:
        return "No options.\n"
    explained = _docstrings(config)
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in config.model_fields.items():
        default = "" if field.is_required() else f"`{field.default}`"
        rows.append(f"| `{name}` | {default} | {explained[name]} |")
    return "\n".join(rows) + "\n"


def _docstrings(config: type[Config]) -> dict[str, str]:
    """The text under each field."""
    tree = ast.parse(Path(sys.modules[config.__module__].__file__).read_text(encoding="utf-8"))
    owner = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == config.__name__)
    pairs = zip(owner.body, owner.body[1:], strict=False)
    return {
        ast.unparse(field.target): " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


if __name__ == "__main__":
    (HERE / "params.md").write_text(page(), encoding="utf-8")
