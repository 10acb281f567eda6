"""What ingest knows of every file of a source. On disk (SQLite), so that memory does not grow with the number of files.

A file is looked at once: as long as the source gives it the same version, what was found stands. Every file ends as a
sample, a duplicate of one, or a reject; a sample is a content, and lives as long as one file has it.
"""

import contextlib
import itertools
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from darkmatter.sources import Item

_TABLES = """
CREATE TABLE IF NOT EXISTS made (text TEXT);
CREATE TABLE IF NOT EXISTS files (
    name BLOB PRIMARY KEY, version TEXT, label TEXT, split TEXT, place TEXT,
    present INTEGER,   -- in the source now
    -- what was found out; all NULL: not looked at
    sha256 TEXT, extension TEXT, fingerprint INTEGER, reason TEXT, detail TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_content ON files (sha256);
DROP TABLE IF EXISTS samples;
CREATE TABLE samples (key TEXT PRIMARY KEY, split TEXT, label TEXT, shard TEXT) WITHOUT ROWID;  -- those in shards
DROP TABLE IF EXISTS chosen;
-- of each content the file that stands for it; `near` is the key of a sample that looks the same
CREATE TABLE chosen (key TEXT PRIMARY KEY, name BLOB, split TEXT, label TEXT, near TEXT) WITHOUT ROWID;
CREATE INDEX by_split ON chosen (split, name);
"""
#: The columns that outlive an ingest.
_KEPT = (
    "name",
    "version",
    "label",
    "split",
    "place",
    "present",
    "sha256",
    "extension",
    "fingerprint",
    "reason",
    "detail",
)
_UNKNOWN = "present AND sha256 IS NULL AND reason IS NULL"
_ROWS = 2_000  # of a batch of rows on their way to and from disk

Row = dict[str, Any]
Alike = Callable[[Iterator[tuple[str, int, bool]]], Iterator[tuple[str, str]]]


def key_of(sha256: str) -> str:
    """The key of a sample with this content."""
    return sha256[:32]


class Ledger:
    """Names are bytes on disk, since file systems have names that are no text."""

    def __init__(self, path: Path, *, made: Mapping[str, Any]) -> None:
        """Opens what an interrupted ingest left at `path`, if it was `made` in the same way."""
        self.path, text = path, json.dumps(made, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = self._open()
        before = self._database.execute("SELECT text FROM made").fetchone()
        if before and before[0] != text:
            self.remove()
            self._database, before = self._open(), None
        self.is_new = before is None
        if self.is_new:
            self._database.execute("INSERT INTO made VALUES (?)", [text])
        self._database.execute("UPDATE files SET present = 0")
        self._database.commit()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path)
        database.row_factory = sqlite3.Row
        # A killed process loses nothing that it wrote; only the machine's end could, and then the work is done again.
        database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;" + _TABLES)
        return database

    # --- what there was before, what there is now

    def load(self, path: Path) -> None:
        """What `save` wrote at the end of the last ingest."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                rows = [tuple(row.values()) for row in batch.select(_KEPT).to_pylist()]
                self._many(f"INSERT INTO files VALUES ({', '.join('?' * len(_KEPT))})", rows)
        self._database.execute("UPDATE files SET present = 0")
        self._database.commit()

    def have(self, shard: str, split: str, keys: Sequence[str], labels: Sequence[str | None]) -> None:
        """These samples are in a shard."""
        rows = ((key, split, label, shard) for key, label in zip(keys, labels, strict=True))
        self._many("INSERT INTO samples VALUES (?, ?, ?, ?)", rows)

    def list(self, items: Iterable[Item], *, labels: bool) -> int:
        """What the source holds now. Returns how many items.

        Raises:
            ValueError: two items have the same name.
        """
        columns = "name, version, label, split, place, present"
        statement = f"""
            INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, 1) ON CONFLICT (name) DO UPDATE SET
            sha256 = iif(version = excluded.version, sha256, NULL), reason = iif(version = excluded.version, reason, NULL),
            version = excluded.version, label = excluded.label, split = excluded.split, place = excluded.place,
            present = present + 1"""
        rows = ((os.fsencode(i.name), i.version, i.label if labels else None, i.split, i.place) for i in items)
        count = self._many(statement, rows)
        twice = self._database.execute("SELECT name FROM files WHERE present > 1").fetchone()
        if twice:
            raise ValueError(f"the source lists {os.fsdecode(twice['name'])!r} twice")
        return count

    # --- what is found out

    def unknown(self) -> int:
        """How many items have to be looked at."""
        return self._one(f"SELECT count(*) FROM files WHERE {_UNKNOWN}")

    def unknown_items(self) -> Iterator[Item]:
        """Those, in the order of their names. May be asked while answers are noted."""
        after = b""
        while True:
            rows = self._database.execute(
                f"SELECT * FROM files WHERE {_UNKNOWN} AND name > ? ORDER BY name LIMIT 1024",
                [after],
            ).fetchall()
            if not rows:
                return
            after = rows[-1]["name"]
            yield from map(_item, rows)

    def note(self, found: Iterable[tuple[str, str | None, str | None, int | None, str | None, str | None]]) -> None:
        """(name, sha256, extension, fingerprint, reason, detail) of items that were looked at."""
        self._many(
            "UPDATE files SET sha256 = ?, extension = ?, fingerprint = ?, reason = ?, detail = ? WHERE name = ?",
            ((*rest, os.fsencode(name)) for name, *rest in found),
        )
        self._database.commit()

    # --- what follows

    def choose(self, split_of: Callable[[str], str], near: Alike) -> None:
        """Decides which file stands for each content: one that a sample was made of, else the first by name.

        Args:
            split_of: sha256 to split, where the source does not say.
            near: told (key, fingerprint, whether it is a sample already) of each content, answers (key, key of an earlier
                one that looks the same).
        """
        self._database.create_function("split_of", 1, split_of, deterministic=True)
        self._database.execute("DELETE FROM chosen")
        self._database.execute(
            """INSERT INTO chosen SELECT key, name, split, label, NULL FROM (
                SELECT substr(f.sha256, 1, 32) AS key, f.name, coalesce(f.split, split_of(f.sha256)) AS split, f.label,
                row_number() OVER (PARTITION BY f.sha256 ORDER BY
                    s.key IS NOT NULL AND s.label IS f.label AND s.split = coalesce(f.split, split_of(f.sha256)) DESC, f.name
                ) AS place
                FROM files f LEFT JOIN samples s ON s.key = substr(f.sha256, 1, 32)
                WHERE f.present AND f.sha256 IS NOT NULL
            ) WHERE place = 1"""
        )
        rows = self._database.execute(
            """SELECT c.key, f.fingerprint, s.key IS NOT NULL AS there FROM chosen c JOIN files f USING (name)
            LEFT JOIN samples s USING (key) WHERE f.fingerprint IS NOT NULL ORDER BY there DESC, c.name"""
        )
        alike = near((row["key"], row["fingerprint"], bool(row["there"])) for row in rows)
        for key, other in list(alike):
            self._database.execute("UPDATE chosen SET near = ? WHERE key = ?", [other, key])
        self._database.commit()

    def labels(self) -> Iterator[str]:
        """Every label that a sample will have, sorted."""
        query = "SELECT DISTINCT label FROM chosen WHERE label IS NOT NULL AND near IS NULL ORDER BY label"
        return (row["label"] for row in self._database.execute(query))

    def leaving(self, *, removed: bool) -> dict[str, set[str]]:
        """Shard -> keys that must leave it: their label or split is another now, or (with `removed`) no file has them."""
        query = """SELECT s.key, s.shard FROM samples s LEFT JOIN chosen c USING (key)
            WHERE (c.key IS NULL AND ?) OR (c.key IS NOT NULL AND (c.label IS NOT s.label OR c.split <> s.split))"""
        found: dict[str, set[str]] = {}
        for row in self._database.execute(query, [removed]):
            found.setdefault(row["shard"], set()).add(row["key"])
        return found

    def left(self, keys: Iterable[str]) -> None:
        """These samples are in no shard any more."""
        self._many("DELETE FROM samples WHERE key = ?", ([key] for key in keys))

    def missing(self, split: str) -> Iterator[tuple[Item, str, str, str | None]]:
        """(item, sha256, extension, label) of each content of this split that is in no shard, by name."""
        after = b""
        while True:
            rows = self._database.execute(
                """SELECT f.*, c.label AS chosen FROM chosen c JOIN files f USING (name) LEFT JOIN samples s USING (key)
                WHERE c.split = ? AND c.near IS NULL AND s.key IS NULL AND c.name > ? ORDER BY c.name LIMIT 1024""",
                [split, after],
            ).fetchall()
            if not rows:
                return
            after = rows[-1]["name"]
            for row in rows:
                yield _item(row), row["sha256"], row["extension"], row["chosen"]

    def count_missing(self) -> int:
        return self._one(
            "SELECT count(*) FROM chosen c LEFT JOIN samples s USING (key) WHERE c.near IS NULL AND s.key IS NULL"
        )

    # --- what people read

    def rejects(self) -> Iterator[Row]:
        """name, reason, detail."""
        return self._rows("SELECT name, reason, detail FROM files WHERE present AND reason IS NOT NULL ORDER BY name")

    def duplicates(self) -> Iterator[Row]:
        """name, same_as: files with a content that another file stands for."""
        return self._rows(
            """SELECT f.name, c.name AS same_as FROM files f JOIN chosen c ON c.key = substr(f.sha256, 1, 32)
            WHERE f.present AND c.name <> f.name ORDER BY f.name"""
        )

    def near_duplicates(self) -> Iterator[Row]:
        """name, looks_like."""
        return self._rows(
            "SELECT c.name, o.name AS looks_like FROM chosen c JOIN chosen o ON o.key = c.near ORDER BY c.name"
        )

    def removed(self) -> Iterator[Row]:
        """name: files that are gone, while the sample that was made of them is still there."""
        return self._rows(
            """SELECT f.name FROM files f JOIN samples s ON s.key = substr(f.sha256, 1, 32) LEFT JOIN chosen c USING (key)
            WHERE NOT f.present AND c.key IS NULL ORDER BY f.name"""
        )

    def reasons(self) -> dict[str, int]:
        rows = self._database.execute(
            "SELECT reason, count(*) AS n FROM files WHERE present AND reason IS NOT NULL GROUP BY reason ORDER BY reason"
        )
        return {row["reason"]: row["n"] for row in rows}

    def save(self, path: Path) -> None:
        """All that the next ingest needs; not files that are gone and left nothing. Equal knowledge gives equal bytes."""
        import pyarrow as pa
        import pyarrow.parquet

        schema = pa.schema(
            [
                (
                    name,
                    pa.binary()
                    if name == "name"
                    else pa.int64()
                    if name in ("present", "fingerprint")
                    else pa.string(),
                )
                for name in _KEPT
            ]
        )
        rows = self._database.execute(
            f"""SELECT {", ".join(_KEPT)} FROM files f WHERE present OR
            EXISTS (SELECT 1 FROM samples s WHERE s.key = substr(f.sha256, 1, 32)) ORDER BY name"""
        )
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            while some := rows.fetchmany(_ROWS):
                writer.write_batch(pa.RecordBatch.from_pylist([dict(row) for row in some], schema))

    def remove(self) -> None:
        """Nothing of it is left on disk."""
        self._database.close()
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.path}{suffix}")

    # --- SQLite

    def _many(self, statement: str, rows: Iterable[Any]) -> int:
        count = 0

        def counted() -> Iterator[Any]:
            nonlocal count
            for row in rows:
                count += 1
                yield row

        with self._database:
            self._database.executemany(statement, counted())
        return count

    def _one(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])

    def _rows(self, query: str) -> Iterator[Row]:
        for row in self._database.execute(query):
            yield {key: os.fsdecode(row[key]) if isinstance(row[key], bytes) else row[key] for key in row.keys()}  # noqa: SIM118


def _item(row: sqlite3.Row) -> Item:
    return Item(os.fsdecode(row["name"]), row["version"], row["label"], row["split"], row["place"])


def near_duplicates(distance: int) -> Alike:
    """What `choose` asks: an image is left out whose fingerprint differs from an earlier one's in at most `distance` bits.

    Two such fingerprints agree in one of distance + 1 bands of bits, so that few have to be compared. Negative: none is.
    Takes about 100 bytes a band and image.
    """
    import numpy as np

    edges = np.linspace(0, 64, distance + 2).round().astype(int).tolist() if distance >= 0 else [0]

    def alike(rows: Iterator[tuple[str, int, bool]]) -> Iterator[tuple[str, str]]:
        kept: list[tuple[str, int]] = []
        bands: list[dict[int, list[int]]] = [{} for _ in edges[1:]]
        for key, signed, there in rows:
            if distance < 0:
                return
            bits = signed % 2**64
            parts = [(bits >> low) & ((1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
            places = {place for band, part in zip(bands, parts, strict=True) for place in band.get(part, ())}
            found = min((place for place in places if (kept[place][1] ^ bits).bit_count() <= distance), default=None)
            if found is not None and not there:
                yield key, kept[found][0]
                continue
            for band, part in zip(bands, parts, strict=True):
                band.setdefault(part, []).append(len(kept))
            kept.append((key, bits))

    return alike
