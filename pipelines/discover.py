"""discover: always runs, reads no file's content; a source that has not changed leaves all that follows alone."""

from darkmatter import console, files, params, sources


def main() -> None:
    config = params.parse(sources.SourceConfig, params.read()["source"], where="source")
    files.write_json("data/source.json", {"uri": config.uri, "state": sources.open_source(config).state()})


if __name__ == "__main__":
    console.run(main)
