"""What people read after a run: report.html, and the few lines on the terminal."""

import base64
import csv
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from darkmatter import lineage, params, pictures

#: The stages whose metrics the page shows.
SOURCES = ("ingest", "augment", "pretrain", "evaluate")
_ACCURACIES = ("few_shot", "knn", "linear_probe", "least_squares", "robustness", "retrieval")  # in percent
_BRIEF = ("few shot", "linear probe", "knn", "rankme", "energy margin")


def read_history(path: Path) -> list[dict[str, float]]:
    """Rows of the training's CSV; a number that a row does not have is left out of it."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All that report.html and the terminal say."""

    metrics: Mapping[str, Any]  # by stage
    decision: Mapping[str, Any]  # what register returned
    params: Mapping[str, Any]
    plots: Path

    @functools.cached_property
    def commit(self) -> dict[str, Any]:
        """As `lineage.git_commit`."""
        return lineage.git_commit()

    def html(self) -> str:
        """One self-contained page: pictures are inside it, nothing is fetched."""
        plots = {path.stem: _inline(path) for path in sorted(self.plots.glob("*.png"))}
        template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
            Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
        )
        return template.render(
            verdict=self.verdict(),
            tables=self.tables(),
            columns=self.columns(),
            decision=self.decision,
            pictures=plots,
            metrics=self.metrics,
            params=self.params,
            commit=self.commit,
            usage=self.usage(),
        )

    def verdict(self) -> str:
        """The outcome in a sentence."""
        version, aliases = self.decision["version"], self.decision["alias"]
        broken = [f"{name} ({rule['reason']})" for name, rule in self.decision["rules"].items() if not rule["passed"]]
        name = self.params["register"]["model"]
        if version is None:
            return f"Refused, nothing was registered. Failed: {'; '.join(broken)}."
        how = "registered" if self.decision["new"] else "was registered before"
        if "champion" in aliases:
            return f"{name} version {version} {how} and is the champion."
        reason = self.decision["rules"]["beats the champion"]["reason"]
        return f"{name} version {version} {how} as candidate; it does not replace the champion: {reason}."

    def tables(self) -> dict[str, list[tuple[str, dict[str, str]]]]:
        """Of each evaluation: (protocol, subject -> text)."""
        found: dict[str, list[tuple[str, dict[str, str]]]] = {}
        for evaluation, protocols in self.metrics["evaluate"].items():
            for protocol, row in protocols.items() if isinstance(protocols, dict) else ():
                rows = found.setdefault(evaluation.replace("_", " "), [])
                if "skipped" in row:
                    rows.append((protocol, {"pretrained": f"not measured: {row['skipped']}"}))
                    continue
                label = protocol
                if protocol.startswith("all-way"):
                    label += f" ({row['pretrained']['classes']} classes)"
                percent = evaluation in _ACCURACIES and protocol != "mAP"
                rows.append((label, {name: _cell(row[name], percent) for name in pictures.subjects([row])}))
        return found

    def columns(self) -> list[str]:
        """The subjects that any row has."""
        return pictures.subjects(row for rows in self.tables().values() for _, row in rows)

    def usage(self) -> dict[str, str]:
        """Commands that go on from here."""
        name, place, version = self.params["register"]["model"], self.params["place"], self.decision["version"]
        again = f"git checkout {self.commit['commit'] or 'COMMIT'}\ndvc repro"
        if version is not None and version.isdigit():  # the page inside a version does not know its number yet
            again = f"python -m darkmatter.registry reproduce {version}"
        return {
            "look": f".venv/bin/mlflow ui --backend-store-uri {place['mlflow']}",
            "load": f'mlflow.pyfunc.load_model("models:/{name}@champion")',
            "reproduce": again,
        }

    def text(self) -> str:
        """For the terminal, where not everything has a place."""
        subjects = self.columns()
        brief = [
            (label if evaluation in ("few shot", label) else f"{evaluation}, {label}", row)
            for evaluation, rows in self.tables().items()
            for label, row in rows
            if evaluation in _BRIEF and "logistic" not in label
        ]
        width = max((len(label) for label, _ in brief), default=0) + 2
        lines = ["", " " * width + "".join(f"{name:>17}" for name in subjects)]
        lines += [label.ljust(width) + "".join(f"{row.get(n, ''):>17}" for n in subjects) for label, row in brief]
        lines += ["", "gate"]
        for name, rule in self.decision["rules"].items():
            lines.append(f"  {'pass' if rule['passed'] else 'FAIL'}  {name}: {rule['reason']}")
        usage = self.usage()
        lines += [
            "",
            self.verdict(),
            "",
            "report  report.html (every evaluation, and pictures)",
            f"MLflow  {usage['look']}",
            f"load    {usage['load']}",
            "",
        ]
        return "\n".join(lines)


def _cell(score: Mapping[str, Any], percent: bool) -> str:
    mean, half = score["mean"], score["ci95"]
    if percent:
        return f"{100 * mean:.1f} ± {100 * half:.1f} %"
    return f"{mean:.4g}" if half is None else f"{mean:.4f} ± {half:.4f}"


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def main() -> None:
    """`python -m darkmatter.report`: the results of the last run, on the terminal."""
    metrics = {name: json.loads(Path(f"metrics/{name}.json").read_text()) for name in (*SOURCES, "register")}
    page = Page(metrics=metrics, decision=metrics["register"], params=params.read(), plots=Path("plots"))
    print(page.text())


if __name__ == "__main__":
    main()
