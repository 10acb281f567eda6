"""discover: always runs, reads no file's content; a world that has not changed leaves all that follows alone.

data/source.json: the state of the source. data/tree.json: files of code and params that are not committed, so that
`register` looks at a model again that it refused for them.
"""

from darkmatter import console, files, lineage, params, sources


def main() -> None:
    config = params.parse(sources.SourceConfig, params.read()["source"], where="source")
    files.write_json("data/source.json", {"uri": config.uri, "state": sources.open_source(config).state()})
    files.write_json("data/tree.json", {"uncommitted": lineage.git_commit()["dirty"]})


if __name__ == "__main__":
    console.run(main)
