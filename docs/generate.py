"""Writes docs/params.md from the Configs and the tables of docs/objectives.md: `make docs`. Tests fail when one is stale."""

import ast
import importlib
import inspect
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from darkmatter import plugin
from darkmatter.objectives import Objective
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
    "register.card": "darkmatter.registry.CardConfig",
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
            key = (
                "`seed`: of the episodes. `beside`: model folders, or networks of timm with their weights, to score as "
                "well. Every other key runs the evaluation of that name.\n\n"
            )
        parts.append(f"## {section}\n\n{key}".rstrip() + "\n")
        for name in plugin.names(target):
            module = importlib.import_module(f"darkmatter.{target}.{name}")
            about = inspect.getdoc(module).split("\n\n")[0].replace("\n", " ")
            parts.append(f"### {section}.{name}\n\n{about}\n\n{_table(module.Config)}")
    return "\n".join(parts)


def objectives() -> str:
    """docs/objectives.md with its tables made new."""
    before, _, rest = (HERE / "objectives.md").read_text(encoding="utf-8").partition("<!-- begin -->")
    _, _, after = rest.partition("<!-- end -->")
    rows = [json.loads(line) for line in (HERE / "objectives.jsonl").read_text(encoding="utf-8").splitlines()]
    return f"{before}<!-- begin -->\n\n{_methods()}\n{_measured(rows)}\n<!-- end -->{after}"


def _methods() -> str:
    lines = ["| method | family | against collapse | energy F(x, y) | choose it |", "| --- | --- | --- | --- | --- |"]
    for name in plugin.names("objectives"):
        module = importlib.import_module(f"darkmatter.objectives.{name}")
        text = inspect.getdoc(module)
        energy = re.search(r"^Energy \(inference\):\s+F\(x, y\) = (.*?)(?=\n[A-Z][^\n]*:|\n\n|\Z)", text, re.M | re.S)
        choice = re.search(r"^Family: (.*?)\. Choose it (.*?)(?=\n\n|\Z)", text, re.M | re.S)
        if not energy or not choice:
            raise ValueError(
                f"objectives/{name}.py: the docstring lacks `Energy (inference):  F(x, y) = ` or `Family: `"
            )
        owner = next(
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Objective) and value.__module__ == module.__name__
        )
        cells = [f"`{name}`", choice[1], owner.against_collapse, energy[1], choice[2]]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _measured(rows: list[dict[str, Any]]) -> str:
    """A table a data set and backbone; means over the seeds."""
    parts = []
    for data, backbone in dict.fromkeys((row["data"], row["backbone"]) for row in rows):
        here = [row for row in rows if (row["data"], row["backbone"]) == (data, backbone)]
        seeds, steps = len({row["seed"] for row in here}), max(row.get("steps", 0) for row in here)
        parts.append(f"### Measured on {data}, {backbone}, {steps} steps, {seeds} seeds\n")
        columns = (
            "method",
            "few-shot %",
            "lightly's",
            "kNN",
            "RankMe",
            "margin",
            "images/s",
            "MiB",
            "step time / lightly's",
        )
        parts.append("| " + " | ".join(columns) + " |")
        parts.append("| --- " * len(columns) + "|")
        for method in dict.fromkeys(row["method"] for row in here):
            ours = [row for row in here if row["method"] == method and row["side"] == "darkmatter"]
            theirs = [row for row in here if row["method"] == method and row["side"] == "lightly"]
            if not ours:
                baseline = [row for row in here if row["method"] == method]
                knn, rankme = (statistics.mean(row[key] for row in baseline) for key in ("knn", "rankme"))
                parts.append(f"| *{method}* | {_accuracy(baseline)} | | {knn:.1%} | {rankme:.1f} | | | | |")
                continue
            mean = {
                key: statistics.mean(row[key] for row in ours)
                for key in ("knn", "rankme", "margin", "images_per_second", "memory_mib")
            }
            ratios = [row["step_time_ratio"] for row in ours if row["step_time_ratio"]]
            parts.append(
                f"| `{method}` | {_accuracy(ours)} | {_accuracy(theirs)} | {mean['knn']:.1%} | {mean['rankme']:.1f} | "
                f"{mean['margin']:.3f} | {mean['images_per_second']:.0f} | {mean['memory_mib']:.0f} | "
                f"{f'{statistics.mean(ratios):.2f}' if ratios else ''} |"
            )
        parts.append("")
    return "\n".join(parts)


def _accuracy(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds; the interval holds the spread of the seeds (Student's t) or of the episodes, whichever is larger.

    All seeds meet the same episodes, so that more seeds do not make the interval of the episodes smaller.
    """
    if not rows:
        return ""
    values = [100 * row["few_shot"] for row in rows]
    episodes = 100 * statistics.mean(row["few_shot_ci95"] for row in rows)
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(rows), 1.96)
    spread = quantile * statistics.stdev(values) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {max(episodes, spread):.1f}"


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
    found = {}
    for base in reversed([one for one in config.__mro__ if issubclass(one, Config)]):
        tree = ast.parse(Path(sys.modules[base.__module__].__file__).read_text(encoding="utf-8"))
        owner = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        for field, text in zip(owner.body, owner.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(text.value.value.split())
    return found


if __name__ == "__main__":
    (HERE / "params.md").write_text(page(), encoding="utf-8")
    (HERE / "objectives.md").write_text(objectives(), encoding="utf-8")
