# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "mlflow==3.17.2", "torch>=2.11", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg",  # of every version
#   "faiss-cpu>=1.12",
# ]
# ///
"""Which images of a folder are like this one? `python examples/search.py PHOTOS QUERY.jpg --index photos.npz`.

The folder is embedded by the champion once and kept in one file: a faiss index and the names. The next call embeds only
what came since, forgets what went, and embeds again what was changed. An index of another version of the model is refused:
embeddings of two versions have nothing to do with each other.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

import faiss
import numpy as np

import sheet
from version import CHAMPION, Stop, Version, embed_files, open_version, pictures, run, tell


@dataclasses.dataclass
class Index:
    """Embeddings of unit length, so that their inner product is the cosine, and the file behind each."""

    vectors: faiss.IndexFlatIP
    files: list[str]
    """Relative to the folder."""
    states: list[str]
    """Size and time of each file when it was embedded."""

    def forget(self, places: list[int]) -> None:
        self.vectors.remove_ids(np.array(places, np.int64))
        gone = set(places)
        self.files = [one for place, one in enumerate(self.files) if place not in gone]
        self.states = [one for place, one in enumerate(self.states) if place not in gone]

    def save(self, path: Path, about: dict[str, str]) -> None:
        """Whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(
                    file, index=faiss.serialize_index(self.vectors), about=json.dumps(about),
                    files=json.dumps(self.files), states=json.dumps(self.states),
                )  # fmt: skip
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load(path: Path, about: dict[str, str]) -> Index:
    """
    Raises:
        Stop: it is no index of this program, or one of another version, or of another folder.
    """
    try:
        with np.load(path) as kept:
            parts = {name: json.loads(str(kept[name])) for name in ("about", "files", "states")}
            vectors = faiss.deserialize_index(kept["index"])
    except (ValueError, KeyError, OSError) as error:
        raise Stop(f"{path} is no index of this program ({error}); remove it or name another --index") from error
    other = parts["about"]
    if other["seal"] != about["seal"]:
        raise Stop(
            f"{path} holds embeddings of {other['version']}, and this is {about['version']}: they cannot be compared. "
            f"Name another --index, or search with --model {other['uri']}"
        )
    if other["folder"] != about["folder"]:
        raise Stop(f"{path} is the index of {other['folder']}, not of {about['folder']}; name another --index")
    return Index(vectors, parts["files"], parts["states"])


def update(version: Version, folder: Path, path: Path) -> Index:
    """The index of the folder as it is now."""
    about = {
        "version": str(version), "uri": version.uri, "seal": version.seal, "folder": str(folder.resolve()),
    }  # fmt: skip
    now = {str(one.relative_to(folder)): _state(one) for one in pictures(folder)}
    index = load(path, about) if path.is_file() else None
    old = dict(zip(index.files, index.states, strict=True)) if index else {}
    new = [name for name, state in now.items() if old.get(name) != state]
    vectors, usable, rejects = embed_files(version, [folder / name for name in new], normalize=True)
    tell(rejects)
    gone = [place for place, (name, state) in enumerate(old.items()) if now.get(name) != state]
    if index is None:
        if not usable:
            raise Stop(f"{folder} holds no usable image")
        index = Index(faiss.IndexFlatIP(vectors.shape[1]), [], [])
    if gone:
        index.forget(gone)
    if usable:
        index.vectors.add(vectors)
        names = [str(one.relative_to(folder)) for one in usable]
        index.files += names
        index.states += [now[name] for name in names]
    if gone or usable:
        index.save(path, about)
    print(f"{path}: {len(index.files)} images, {len(usable)} embedded now, {len(gone)} forgotten ({version})")
    return index


def _state(path: Path) -> str:
    state = path.stat()
    return f"{state.st_size} {state.st_mtime_ns}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of images")
    parser.add_argument("query", type=Path, nargs="+", help="image files; several are several questions")
    parser.add_argument("--index", type=Path, default=Path("index.npz"))
    parser.add_argument("--hits", type=int, default=8)
    parser.add_argument("--sheet", type=Path, default=Path("hits.png"), help="a picture of queries and hits")
    parser.add_argument("--model", default=CHAMPION)
    arguments = parser.parse_args()
    missing = [str(one) for one in arguments.query if not one.is_file()]
    if missing:
        raise Stop(f"there is no file {', '.join(missing)}")
    pictures(arguments.folder)  # before the model is loaded
    version = open_version(arguments.model)
    index = update(version, arguments.folder, arguments.index)
    queries, usable, rejects = embed_files(version, arguments.query, normalize=True)
    if rejects:
        raise Stop("; ".join(f"{path} is no usable image: {reason}" for path, reason in rejects.items()))
    if not index.files:
        raise Stop(f"{arguments.folder} holds no usable image")
    similarities, places = index.vectors.search(queries, min(arguments.hits, len(index.files)))
    rows = []
    for path, row, found in zip(usable, similarities, places, strict=True):
        print(f"\n{path}")
        for similarity, place in zip(row, found, strict=True):
            print(f"  {similarity:.3f}  {index.files[place]}")
        hits = [
            (arguments.folder / index.files[place], f"{similarity:.3f}\n{index.files[place]}")
            for similarity, place in zip(row, found, strict=True)
        ]
        rows.append((f"{path.name} and what is like it, by {version}", [(path, "query"), *hits]))
    sheet.draw(rows, arguments.sheet)
    print(f"\n{arguments.sheet}: {len(rows)} {'query' if len(rows) == 1 else 'queries'} with hits")


if __name__ == "__main__":
    run(main)
