import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from darkmatter.training import checkpoint


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((50_000,), float(step))}


def test_the_newest_of_the_last_two_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000010", "step-0000015"]
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 15
    assert torch.equal(loaded["weights"], state(15)["weights"])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path, step, state(step))
    path = tmp_path / "step-0000010" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "flip" else bytes(content[:-100]))
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 5
    assert "step-0000010 is damaged" in capsys.readouterr().err


def _save_for_ever(folder: str) -> None:
    for step in range(1, 10**6):
        checkpoint.save(Path(folder), step, state(step))


def test_kills_in_the_middle_of_saving_never_leave_a_broken_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = random.Random(0)
    checkpoint.save(tmp_path, 0, state(0))
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(str(tmp_path),))
        process.start()
        time.sleep(moments.uniform(0.02, 0.12))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        loaded = checkpoint.load_newest(tmp_path)
        assert loaded is not None
        assert (loaded["weights"] == loaded["step"]).all()
    assert "damaged" not in capsys.readouterr().err


def test_history_after_a_resume_has_each_step_once(tmp_path: Path) -> None:
    history = checkpoint.History(tmp_path, step=0)
    for step in (10, 20, 30):
        history.append({"step": step, "loss": step / 10})
    with history.path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    assert [row["step"] for row in checkpoint.read_history(tmp_path)] == [10, 20, 30]
    resumed = checkpoint.History(tmp_path, step=20)
    resumed.append({"step": 30, "loss": 7.0})
    assert [row["step"] for row in checkpoint.read_history(tmp_path)] == [10, 20, 30]
    assert checkpoint.read_history(tmp_path)[-1]["loss"] == 7.0
