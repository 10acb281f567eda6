"""augment: data/shards -> data/train (bounded images, no labels), metrics/augment.json and a picture of the views."""

from pathlib import Path

from darkmatter import cluster, console, files, params, pictures, training_set


def main() -> None:
    tree = params.read()
    config = params.parse(training_set.AugmentConfig, tree["augment"], where="augment")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    views = training_set.choose_views(config.views, config)
    with cluster.session(place):
        statistics = training_set.build(Path("data/shards"), config, Path("data/train"))
    pictures.contact_sheet(*training_set.look(Path("data/train"), views), Path("plots/views.png"))
    files.write_json("metrics/augment.json", statistics)


if __name__ == "__main__":
    console.run(main)
