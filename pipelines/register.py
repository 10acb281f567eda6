"""register: the gate, the registry, metrics/register.json and report.html. A refusal is a result, not a failure."""

import json
from pathlib import Path

from darkmatter import cluster, console, files, params, pictures, registry, report, training_set
from darkmatter.registry import gate
from darkmatter.registry.register import Decision, register

_CHECKED_IMAGES = 32


def main() -> None:
    tree = params.read()
    config = params.parse(registry.RegisterConfig, tree["register"], where="register")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    metrics = {name: json.loads(Path(f"metrics/{name}.json").read_text()) for name in report.SOURCES}
    history = report.read_history(Path("plots/history.csv"))
    pictures.history(history, Path("plots/history.png"))

    def page(decision: Decision) -> str:
        return report.Page(metrics=metrics, decision=decision, params=tree, plots=Path("plots")).html()

    registry.connect(place.mlflow)
    decision = register(
        Path("models/backbone"),
        metrics["evaluate"],
        history,
        tree,
        config,
        ingested=metrics["ingest"],
        pictures=training_set.held_out(Path("data/train"), _CHECKED_IMAGES),
        records=[
            *sorted(Path("plots").iterdir()),
            *(Path(f"metrics/{name}.json") for name in report.SOURCES),
            *map(Path, gate.RECORDS),
        ],
        page=page,
        signing_key=Path(place.signing_key) if place.signing_key else None,
    )
    files.write_json("metrics/register.json", decision)
    files.write("report.html", page(decision))
    print(report.Page(metrics=metrics, decision=decision, params=tree, plots=Path("plots")).verdict())


if __name__ == "__main__":
    console.run(main)
