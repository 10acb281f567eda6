import time

import pytest

from darkmatter.training import goodput
from darkmatter.training.goodput import Clock


def row(step: int, at: float, /, *, session: float, **seconds: float) -> dict[str, float]:
    return {
        "step": step,
        "time": at,
        "session": session,
        **{f"seconds_{cause}": seconds.get(cause, 0.0) for cause in goodput.CAUSES},
    }


def test_an_undisturbed_run() -> None:
    rows = [
        row(10, 130.0, session=100.0, step=8, data=2),
        row(20, 145.0, session=100.0, step=9, data=1, evaluation=2, save=3),
    ]
    found = goodput.shares(rows, ended=150.0)
    assert found == {
        "step": 17 / 50, "data": 3 / 50, "evaluation": 2 / 50, "save": 3 / 50, "start": 25 / 50, "recovery": 0.0,
        "wall_seconds": 50.0,
    }  # fmt: skip


def test_what_was_done_again_and_what_a_restart_took_is_recovery() -> None:
    rows = [
        row(10, 120.0, session=100.0, step=10),
        row(20, 130.0, session=100.0, step=10),
        row(30, 140.0, session=100.0, step=10),  # killed here; the checkpoint is of step 20
        row(30, 170.0, session=100.0, step=10),  # restart within the session: 20 s
        row(40, 180.0, session=100.0, step=10),  # the driver is killed; nothing runs until 1000
        row(50, 1025.0, session=1000.0, step=5),  # 20 s to get going again
    ]
    found = goodput.shares(rows, ended=1030.0)
    wall = 80 + 30
    assert found["wall_seconds"] == wall
    assert found["step"] == pytest.approx((10 + 10 + 10 + 10 + 5) / wall, abs=1e-3)
    assert found["recovery"] == pytest.approx((10 + 20 + 20) / wall, abs=1e-3)
    assert found["start"] == pytest.approx((10 + 5) / wall, abs=1e-3)
    assert sum(found.values()) - wall == pytest.approx(1, abs=1e-3)


def test_a_run_without_a_row_has_lost_nothing() -> None:
    assert goodput.shares([], ended=5.0)["wall_seconds"] == 0


def test_the_clock_counts_each_second_once() -> None:
    began, clock = time.monotonic(), Clock()
    for cause in ("data", "step", "data", "save"):
        time.sleep(0.02)
        clock.spent(cause)
    total = time.monotonic() - began
    found = clock.read()
    assert sum(found.values()) == pytest.approx(total, abs=0.005)
    assert found["seconds_data"] > found["seconds_step"] > 0 == found["seconds_evaluation"]
    assert sum(clock.read().values()) == 0
