import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from darkmatter import files


def test_write_replaces_in_one_step_and_leaves_no_temporary(tmp_path: Path) -> None:
    files.write(tmp_path / "a" / "b.txt", "one")
    files.write(tmp_path / "a" / "b.txt", b"two")
    assert (tmp_path / "a" / "b.txt").read_text() == "two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def _write_for_ever(path: str) -> None:
    for number in range(10**9):
        files.write(path, f"{number % 10}" * 300_000)


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write(path, "0" * 300_000)
    for moment in range(8):
        process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(str(path),))
        process.start()
        time.sleep(0.02 + 0.007 * moment)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        content = path.read_text()
        assert len(content) == 300_000
        assert len(set(content)) == 1


def test_folder_takes_its_name_only_when_the_block_ends_well(tmp_path: Path) -> None:
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(FileNotFoundError), files.whole_folder(tmp_path / "out") as folder:
        (folder / "no such folder" / "a").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def _replace_for_ever(path: str) -> None:
    for number in range(10**9):
        with files.whole_folder(path) as folder:
            for name in range(20):
                (folder / str(name)).write_text(str(number))


def test_a_kill_while_a_folder_is_replaced_leaves_it_whole_or_absent(tmp_path: Path) -> None:
    for moment in range(12):
        process = multiprocessing.get_context("fork").Process(target=_replace_for_ever, args=(str(tmp_path / "out"),))
        process.start()
        time.sleep(0.03 + 0.007 * moment)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if (tmp_path / "out").exists():
            contents = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
            assert len(contents) == 20
            assert len(set(contents.values())) == 1


def test_folder_left_by_a_killed_stage_does_not_leak_into_the_next(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "stale").write_text("")
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "fresh").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fresh"]


def test_json_refuses_what_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "a.json", {"loss": math.nan})
    files.write_json(tmp_path / "a.json", {"loss": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.5}
