"""pretrain: data/train -> models/backbone, metrics/pretrain.json and plots/history.csv; goes on where it was killed."""

from pathlib import Path

from darkmatter import cluster, console, files, model, params, registry, shards, training, training_set
from darkmatter.training.pretrain import pretrain


def main() -> None:
    tree = params.read()
    config = params.parse(training.PretrainConfig, tree["pretrain"], where="pretrain")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    spec = model.ModelSpec(
        backbone=tree["backbone"],
        objective=tree["objective"],
        views=tree["augment"]["views"],
        images=training_set.load_image_spec(Path("data/train")),
        num_samples=shards.Manifest.load(Path("data/train")).samples("train"),
    )
    if config.warm_start:
        registry.connect(place.mlflow)
    with registry.model_folder(config.warm_start) as start, cluster.session(place):
        summary = pretrain(
            Path("data/train"),
            spec,
            config,
            place,
            out=Path("models/backbone"),
            plot=Path("plots/history.csv"),
            start=start,
        )
    files.write_json("metrics/pretrain.json", summary)


if __name__ == "__main__":
    console.run(main)
