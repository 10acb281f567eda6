import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch

from darkmatter import health, remote
from darkmatter.objectives import Objective, Samples, Terms, Views
from darkmatter.training import guards, history
from darkmatter.training.checkpoint import Checkpoints

RUNS = Path(__file__).with_name("runs.py")


#: One of each mechanism, those with the most to remember: queue, clusters, teacher and centre, none, decoder, code book.
FAMILIES = ("moco", "deepcluster", "dino", "vicreg", "mae", "vqvae")


@pytest.mark.parametrize("objective", FAMILIES)
def test_a_killed_run_ends_in_the_same_state_bit_for_bit(objective: str, digits: Path, tmp_path: Path) -> None:
    reference = runs.digest(runs.run(digits / "train", tmp_path / "whole", objective).state_dict())
    folder = tmp_path / "killed"
    command = [sys.executable, str(RUNS), str(digits / "train"), str(folder), objective]
    steps = []
    checkpoints = Checkpoints(str(folder), keep=2)
    for least in (8, 23):  # killed as soon as a row after this step is there: between two checkpoints
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            rows = history.read(str(folder))
            # A checkpoint is written beside the loop, which may be ahead of it by then.
            if rows and rows[-1]["step"] >= least and checkpoints.newest_step() > max(steps, default=0):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
        saved = checkpoints.load_newest()
        assert saved is not None
        steps.append(saved["step"])
    state = runs.run(digits / "train", folder, objective)
    assert steps[0] < steps[1] < state.step
    assert runs.digest(state.state_dict()) == reference
    total = runs.CONFIG.epochs * (len_train(digits) // runs.CONFIG.batch_size)
    assert state.step == total
    assert [row["step"] for row in history.read(str(folder))] == list(range(1, total + 1))


def len_train(digits: Path) -> int:
    from darkmatter import shards

    return shards.Manifest.load(digits / "train").samples("train")


def test_loader_threads_change_nothing(digits: Path, tmp_path: Path) -> None:
    short = runs.CONFIG.model_copy(update={"epochs": 1})
    states = [
        runs.run(digits / "train", tmp_path / str(threads), "simclr", config=short, threads=threads).state_dict()
        for threads in (1, 4)
    ]
    assert runs.digest(states[0]) == runs.digest(states[1])


def test_history_has_the_terms_the_health_and_the_rates(digits: Path, tmp_path: Path) -> None:
    runs.run(digits / "train", tmp_path, "vicreg")
    rows = history.read(str(tmp_path))
    assert {"loss", "invariance", "variance", "covariance", "learning_rate", "images_per_second", "epoch"} <= rows[
        0
    ].keys()
    looks = [row["step"] for row in rows if "energy_margin" in row]
    assert looks == [step for step in range(1, len(rows) + 1) if step % 10 == 0 or step == len(rows)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert 0.5 < rows[-1]["energy_margin"] <= 1
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_margin_that_stays_low_stops_the_run_and_a_resumed_run_counts_on(digits: Path, tmp_path: Path) -> None:
    picky = runs.CONFIG.model_copy(update={"min_energy_margin": 0.999, "save_every": 1})
    message = r"collapse at step (\d+): for 3 looks in a row.*below 0.999.*does not rise.*in SimCLR: contrastive"
    with pytest.raises(health.Collapsed, match=message) as first:
        runs.run(digits / "train", tmp_path, "simclr", config=picky)
    rows = history.read(str(tmp_path))
    total = runs.CONFIG.epochs * (len_train(digits) // runs.CONFIG.batch_size)
    counted = [row for row in rows if "energy_margin" in row and row["step"] > total / 3]
    assert len(counted) >= 3
    assert f"collapse at step {counted[-1]['step']}:" in str(first.value)
    best = max(row["energy_margin"] for row in counted[:-3]) if counted[:-3] else 1.0
    assert all(row["energy_margin"] < best + 0.002 for row in counted[-3:])
    # As if killed between the last two looks: the count goes on where it was.
    for path in tmp_path.glob("step-*"):
        if int(path.name.removeprefix("step-")) == counted[-1]["step"]:
            shutil.rmtree(path)
    with pytest.raises(health.Collapsed) as second:
        runs.run(digits / "train", tmp_path, "simclr", config=picky)
    assert str(second.value) == str(first.value)


def test_a_finished_run_is_not_trained_again(digits: Path, tmp_path: Path) -> None:
    first = runs.run(digits / "train", tmp_path, "simclr")
    rows = history.read(str(tmp_path))
    again = runs.run(digits / "train", tmp_path, "simclr")
    assert runs.digest(again.state_dict()) == runs.digest(first.state_dict())
    assert history.read(str(tmp_path)) == rows


def test_a_learning_rate_that_blows_up_ends_the_run_and_no_checkpoint_holds_it(digits: Path, tmp_path: Path) -> None:
    wild = runs.CONFIG.model_copy(update={"learning_rate": 1e30, "warmup_epochs": 0, "save_every": 1})
    with pytest.raises(
        guards.NotFinite, match=r"(step \d+ is the last of 3 in a row skipped|is not finite at step \d+)"
    ):
        runs.run(digits / "train", tmp_path, "vicreg", config=wild)
    for path in tmp_path.glob("step-*/state.pt"):
        guards.require_finite(torch.load(path), step=0)


def test_steps_whose_numbers_are_not_finite_are_skipped_whole_and_counted(digits: Path, tmp_path: Path) -> None:
    short, bad, calls, after = runs.CONFIG.model_copy(update={"epochs": 2}), {3, 4, 9}, [], []

    def prepare(objective: Objective) -> None:
        loss, after_step = objective.loss, objective.after_step

        def broken(views: Views, samples: Samples) -> Terms:
            calls.append(len(calls))
            return {
                name: value * (math.nan if calls[-1] in bad else 1.0) for name, value in loss(views, samples).items()
            }

        def counted(progress: float) -> None:
            after.append(progress)
            after_step(progress)

        objective.loss, objective.after_step = broken, counted  # type: ignore[method-assign]

    state = runs.run(digits / "train", tmp_path, "dino", config=short, prepare=prepare)
    guards.require_finite(state.state_dict(), state.step)
    assert state.numbers.not_finite == len(bad)
    assert len(calls) == state.step
    assert after == [step / state.step for step in range(state.step) if step not in bad]
    rows = history.read(str(tmp_path))
    assert [row["skipped_not_finite"] for row in rows[2:10]] == [0, 1, 2, 2, 2, 2, 2, 3]
    assert all(("loss" in row) == (row["step"] - 1 not in bad) for row in rows)


def test_rows_that_led_to_an_early_end_are_written_where_a_store_takes_whole_files_only(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history.remote, "is_remote", lambda address: address.endswith("/history.jsonl"))
    monkeypatch.setattr(history, "_PATIENCE", 1000.0)
    monkeypatch.setattr(history.remote, "read", read_local)
    monkeypatch.setattr(history.remote, "write", lambda address, content: Path(address).write_bytes(content))
    picky = runs.CONFIG.model_copy(update={"min_energy_margin": 0.999, "save_every": 1000})
    with pytest.raises(health.Collapsed, match=r"collapse at step (\d+)") as reason:
        runs.run(digits / "train", tmp_path, "simclr", config=picky)
    assert f"collapse at step {history.read(str(tmp_path))[-1]['step']}:" in str(reason.value)


def read_local(address: str, **_: object) -> bytes:
    if not Path(address).is_file():
        raise remote.Unreadable("missing", address)
    return Path(address).read_bytes()
