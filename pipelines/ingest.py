"""ingest: a source -> data/shards (labelled WebDataset tars, manifest, rejects) and metrics/ingest.json."""

from pathlib import Path

from darkmatter import cluster, console, files, ingest, params, sources


def main() -> None:
    tree = params.read()
    source = params.parse(sources.SourceConfig, tree["source"], where="source")
    config = params.parse(ingest.IngestConfig, tree["ingest"], where="ingest")
    place = params.parse(cluster.PlaceConfig, tree["place"], where="place")
    with cluster.session(place):
        counts = ingest.ingest(source, config, out=Path("data/shards"))
    files.write_json("metrics/ingest.json", counts)
    print(
        f"{counts['files_seen']:,} files: {counts['samples']:,} samples, {counts['duplicates']:,} duplicates, "
        f"{counts['rejects']:,} rejected {counts['rejects_by_reason'] or ''}"
    )


if __name__ == "__main__":
    console.run(main)
