"""register: the gate, the registry, metrics/register.json and report.html. A refusal is a result, not a failure."""

import json
from pathlib import Path

from darkmatter import cluster, console, files, params, pictures, registry, report
from darkmatter.registry.package import register


def main() -> None:
    tree = params.read()
    config = params.parse(registry.RegisterConfig, tree["register"], where="register")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    metrics = {name: json.loads(Path(f"metrics/{name}.json").read_text()) for name in report.SOURCES}
    history = report.read_history(Path("plots/history.csv"))
    pictures.history(history, Path("plots/history.png"))
    registry.connect(place.mlflow)
    decision = register(
        Path("models/backbone"),
        metrics["evaluate"],
        history,
        tree,
        config,
        attachments=[*sorted(Path("plots").iterdir()), *(Path(f"metrics/{name}.json") for name in report.SOURCES)],
    )
    files.write_json("metrics/register.json", decision)
    page = report.Page(metrics=metrics, decision=decision, params=tree, plots=Path("plots"))
    files.write("report.html", page.html())
    print(page.verdict())


if __name__ == "__main__":
    console.run(main)
