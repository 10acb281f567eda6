"""evaluate: models/backbone and the labelled splits -> metrics/evaluate.json and plots."""

from pathlib import Path

from darkmatter import cluster, console, files, gallery, params, pictures, registry
from darkmatter.evaluate import evaluate


def main() -> None:
    tree = params.read()
    config = params.parse(registry.RegisterConfig, tree["register"], where="register")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    registry.connect(place.mlflow)
    champion = registry.champion(config.model)
    results = evaluate(
        Path("models/backbone"),
        Path("data/shards"),
        tree["evaluate"],
        champion=champion,
        place=place,
    )
    pictures.few_shot(results.tree, Path("plots/few_shot.png"))
    pictures.energies(*results.energies, Path("plots/energies.png"))
    gallery.draw(results.extraction, results.network, results.subject, Path("plots"))
    files.write_json(
        "metrics/evaluate.json", {"champion_version": champion.version if champion else None, **results.tree}
    )


if __name__ == "__main__":
    console.run(main)
