"""What ingest knows, and that knowing more takes no more memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from darkmatter.ledger import Ledger, key_of
from darkmatter.sources import Item

MADE = {"code": "1"}

MEMORY = """
import hashlib, resource, sys
from pathlib import Path
from darkmatter.ledger import Ledger, near_duplicates
from darkmatter.sources import Item

count, folder = int(sys.argv[1]), Path(sys.argv[2])
def digest(number): return hashlib.sha256(str(number).encode()).hexdigest()
ledger = Ledger(folder / "ledger", made={})
ledger.list((Item(f"folder/{number:09d}.png", "1-1", str(number % 10)) for number in range(count)), labels=True)
ledger.note((item.name, digest(int(item.name[7:16]) // 2), "png", None, None, None) for item in ledger.unknown_items())
ledger.choose(lambda sha256: "train", near_duplicates(-1))
missing = sum(1 for _ in ledger.missing("train"))
duplicates = sum(1 for _ in ledger.duplicates())
ledger.save(folder / "files.parquet")
ledger.remove()
again = Ledger(folder / "ledger", made={})
again.load(folder / "files.parquet")
again.list((Item(f"folder/{number:09d}.png", "1-1", str(number % 10)) for number in range(count)), labels=True)
assert again.unknown() == 0
again.remove()
print(missing, duplicates, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 200_000):
        (tmp_path / str(count)).mkdir()
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / str(count))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        missing, duplicates, peak = map(int, done.stdout.split())
        assert (missing, duplicates) == (count // 2, count // 2)
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_what_an_interrupted_run_found_out_is_still_known(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", made=MADE)
    assert ledger.is_new
    ledger.list([Item("a", "1"), Item("b", "1"), Item("c", "")], labels=False)
    ledger.note([("a", "0" * 64, "png", None, None, None), ("c", None, None, None, "damaged", "")])
    ledger._database.close()
    again = Ledger(tmp_path / "ledger", made=MADE)
    assert not again.is_new
    assert again.list([Item("a", "1"), Item("b", "1"), Item("c", "")], labels=False) == 3
    assert [item.name for item in again.unknown_items()] == ["b"]
    again._database.close()
    other = Ledger(tmp_path / "ledger", made={"code": "2"})
    assert other.is_new
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_another_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", made=MADE)
    ledger.list([Item("a", "1"), Item("b", "1")], labels=False)
    ledger.note([("a", "0" * 64, "png", None, None, None), ("b", None, None, None, "damaged", "")])
    ledger._database.close()
    again = Ledger(tmp_path / "ledger", made=MADE)
    again.list([Item("a", "2"), Item("b", "2")], labels=False)
    assert [item.name for item in again.unknown_items()] == ["a", "b"]
    again.remove()


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", made=MADE)
    with pytest.raises(ValueError, match="the source lists 'a' twice"):
        ledger.list([Item("a"), Item("b"), Item("a")], labels=False)
    ledger.remove()


def test_keys_are_half_a_digest() -> None:
    assert key_of("ab" * 32) == "ab" * 16
