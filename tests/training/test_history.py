from pathlib import Path

import pytest

from darkmatter import remote
from darkmatter.training import history
from darkmatter.training.history import History


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": step / 10} for step in steps]


def test_after_a_restart_each_step_is_there_once_as_it_was_done_last(address: str) -> None:
    assert history.read(address) == history.read_all(address) == []
    first = History(address)
    for row in rows(10, 20, 30):
        first.append(row)
    first.flush()
    second = History(address)  # from the checkpoint of step 20
    for row in ({"step": 30, "loss": 7.0}, {"step": 40, "loss": 8.0}):
        second.append(row)
    second.flush()
    assert history.read(address) == [*rows(10, 20), {"step": 30, "loss": 7.0}, {"step": 40, "loss": 8.0}]
    assert [row["step"] for row in history.read_all(address)] == [10, 20, 30, 30, 40]


def test_a_line_that_a_kill_cut_off_is_left_out_and_spoils_no_other(tmp_path: Path) -> None:
    first = History(str(tmp_path))
    for row in rows(10, 20):
        first.append(row)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert history.read(str(tmp_path)) == rows(10, 20)
    second = History(str(tmp_path))
    second.append(rows(30)[0])
    assert history.read(str(tmp_path)) == rows(10, 20, 30)


def test_rows_wait_while_the_place_is_away(address: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    written = History(address)
    written.append(rows(1)[0])
    written.flush()
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            if not remote.is_remote(address):  # half a line fits
                with open(f"{address}/history.jsonl", "a") as file:
                    file.write('{"step": 2, "lo')
            raise OSError(28, "No space left on device")

        patch.setattr(remote, "write", full)
        patch.setattr(Path, "open", full)
        for row in rows(2, 3):
            written.append(row)
            written.flush()
    assert "2 rows of the history wait ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert history.read(address) == rows(1)
    written.append(rows(4)[0])
    written.flush()
    assert history.read(address) == rows(1, 2, 3, 4)
