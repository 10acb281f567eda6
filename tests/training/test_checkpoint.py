import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

import s3
from darkmatter import remote
from darkmatter.training import guards
from darkmatter.training.checkpoint import Checkpoints, Saver


def state(step: int) -> dict:
    return {
        "step": step,
        "weights": torch.full((50_000,), float(step)),
        "groups": [{"lr": 0.1, "moments": torch.ones(3)}],
    }


def steps(address: str) -> list[int]:
    return sorted(int(entry.path[5:12]) for entry in remote.listing(address) if entry.path.endswith(".json"))


def test_the_newest_ones_stay_and_the_best(address: str) -> None:
    checkpoints = Checkpoints(address, keep=2)
    assert checkpoints.load_newest() is None
    assert checkpoints.newest_step() == 0
    for step, margin in ((5, 0.7), (10, 0.9), (15, None), (20, 0.8), (25, 0.8)):
        checkpoints.save(step, state(step), margin)
    assert steps(address) == [10, 20, 25]
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == checkpoints.newest_step() == 25
    assert torch.equal(loaded["weights"], state(25)["weights"])
    assert torch.equal(loaded["groups"][0]["moments"], torch.ones(3))
    names = {entry.path for entry in remote.listing(address)}
    assert names == {f"step-{step:07d}/{name}" for step in (10, 20, 25) for name in ("state.pt", "checkpoint.json")}


@pytest.mark.parametrize("missing", ["state.pt", "checkpoint.json"])
def test_half_a_checkpoint_is_not_one(missing: str, address: str) -> None:
    checkpoints = Checkpoints(address, keep=2)
    for step in (5, 10):
        checkpoints.save(step, state(step))
    remote.remove(f"{address}/step-0000010/{missing}")
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 5


def test_every_flipped_bit_and_every_cut_is_noticed_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints, draws = Checkpoints(str(tmp_path), keep=2), random.Random(0)
    for step in (5, 10):
        checkpoints.save(step, state(step))
    path = tmp_path / "step-0000010" / "state.pt"
    good = path.read_bytes()
    for number in range(80):
        damaged = bytearray(good)
        if number % 2:
            damaged[draws.randrange(len(good))] ^= 1 << draws.randrange(8)
        else:
            del damaged[draws.randrange(len(good)) :]
        path.write_bytes(bytes(damaged))
        loaded = checkpoints.load_newest()
        assert loaded is not None
        assert loaded["step"] == 5
        assert "step-0000010 is damaged (its bytes are not those that were written)" in capsys.readouterr().err
    path.write_bytes(good)
    (tmp_path / "step-0000010" / "checkpoint.json").write_text("{")
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 5
    checkpoints.save(10, state(10))  # training comes by again
    assert (checkpoints.load_newest() or {})["step"] == 10


#: Children are made by a process that has no threads yet: what is forked amid torch's and fsspec's may never end.
FORK = multiprocessing.get_context("forkserver")


def _save_for_ever(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    with Saver(checkpoints) as saver:
        for step in itertools.count(checkpoints.newest_step() + 1):
            saver.save(step, state(step), random.random())


def test_kills_in_the_middle_of_saving_never_leave_a_broken_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FORK.set_forkserver_preload(["darkmatter.training.checkpoint"])
    moments, checkpoints = random.Random(0), Checkpoints(str(tmp_path), keep=2)
    checkpoints.save(0, state(0))
    reached = set()
    for _ in range(50):
        process = FORK.Process(target=_save_for_ever, args=(str(tmp_path),))
        process.start()
        before = checkpoints.newest_step()
        while checkpoints.newest_step() == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        loaded = checkpoints.load_newest()
        assert loaded is not None
        assert (loaded["weights"] == loaded["step"]).all()
        reached.add(loaded["step"])
    assert len(reached) == 50
    assert "damaged" not in capsys.readouterr().err


def test_what_is_saved_is_the_state_of_that_moment(tmp_path: Path) -> None:
    weights = torch.zeros(2_000_000)
    with Saver(Checkpoints(str(tmp_path), keep=100)) as saver:
        for step in range(1, 6):
            weights.fill_(step)
            saver.save(step, {"step": step, "weights": weights})
            weights.fill_(-1)  # the next step, while the file is being written
    for step in range(1, 6):
        saved = torch.load(tmp_path / f"step-{step:07d}" / "state.pt")
        assert (saved["weights"] == step).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_never_saved(bad: float, tmp_path: Path) -> None:
    wrong = state(3)
    wrong["groups"][0]["moments"][1] = bad
    with (
        pytest.raises(guards.NotFinite, match=r"groups.0.moments is not finite at step 3"),
        Saver(Checkpoints(str(tmp_path), keep=2)) as saver,
    ):
        saver.save(3, wrong)
    assert not list(tmp_path.iterdir())


def _save_on_a_full_disk(folder: str, last: bool) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Saver(Checkpoints(folder, keep=2)) as saver:
        saver.save(1, state(1))
        saver._settle(last=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        saver.save(2, state(2))
        if not last:
            saver._settle(last=False)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert saver.failed == 1
            saver.save(3, state(3))


@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_costs_one_checkpoint_and_only_the_last_one_must_be_written(last: bool, tmp_path: Path) -> None:
    process = FORK.Process(target=_save_on_a_full_disk, args=(str(tmp_path), last))
    process.start()
    process.join()
    assert process.exitcode == (1 if last else 0)
    loaded = Checkpoints(str(tmp_path), keep=2).load_newest()
    assert loaded is not None
    assert loaded["step"] == (1 if last else 3)
    assert {path.name for path in tmp_path.iterdir()} == {f"step-000000{step}" for step in ((1,) if last else (1, 3))}


def test_a_store_that_is_away_does_not_look_like_a_fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    s3.use(monkeypatch, 9)  # nobody listens
    with pytest.raises(remote.Unreadable, match="connection"):
        Checkpoints("s3://bucket/run", keep=2).load_newest()
    remote._opened.cache_clear()


def test_what_stands_beside_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    Checkpoints(str(tmp_path), keep=2).save(7, state(7), 0.5)
    about = json.loads((tmp_path / "step-0000007" / "checkpoint.json").read_text())
    assert about["step"] == 7
    assert about["energy_margin"] == 0.5
    assert list(about["sha256"]) == ["state.pt"]
