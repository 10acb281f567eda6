"""benchmarks/scale.py: the model by hand, the simulation where formulas are exact, the page against both."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import scale  # noqa: E402

QUIET = dataclasses.replace(scale.LARGE, each_reads_all=False, store_bandwidth=1e15, machine_bandwidth=1e15)


def test_a_plan_by_hand() -> None:
    plan = scale.Plan(
        images=1e6, epochs=10, batch=1000, flops_per_image=1e12, parameters=1e8, machines=2, peak_flops=1e15,
        utilisation=0.5, bytes_per_image=1e5, images_per_cpu_second=100.0, samples_per_shard=1000, window=10,
        store_bandwidth=1e9, machine_bandwidth=4e8, each_reads_all=True, interruptions_per_machine_day=0.5,
    )  # fmt: skip
    found = scale.size(plan)
    assert found.images_per_second == 16 * 500 and found.ideal == 1250
    assert found.data_limit == min(1e9 / 2 / 1e5, 4e8 / 1e5) == 4000  # each card must take all of it
    assert found.read_per_machine == 4e8 and found.read_of_store == 8e8
    assert found.stored == 1e11 and found.shards == 1000 and found.cache_per_machine == 2 * 10 * 1000 * 1e5
    assert found.cores_per_gpu == pytest.approx(500 / (100 * 1.76 / 2))
    assert found.checkpoint == 1.2e9 and found.mean_time_between == 86400
    assert found.wall == pytest.approx(2500, rel=0.02)  # half the rate, and hardly a failure in that time
    apart = scale.size(dataclasses.replace(plan, each_reads_all=False))
    assert apart.data_limit == min(1e9 / 1e5, 4e8 / (1e5 / 2)) == 8000 and apart.read_per_machine == 4e8


def test_operations_of_a_vision_transformer_are_the_known_ones() -> None:
    """timm's ViT-L/16 at 224 pixels: 61.6 billion multiplications with additions, forward."""
    forward = scale.vit_flops(304e6, tokens=(197, 0), views=(1, 0), teacher=0) / 3
    assert forward == pytest.approx(2 * 61.6e9, rel=0.04)


@pytest.mark.parametrize(("cost", "between"), [(2.0, 3600.0), (30.0, 3600.0), (300.0, 7200.0)])
def test_dalys_interval_is_the_best_one(cost: float, between: float) -> None:
    def loss(interval: float) -> float:
        return -scale.efficiency(interval, cost, 60.0, between)

    best = minimize_scalar(loss, bounds=(1.0, 10 * between), method="bounded").x
    assert scale.daly(cost, between) == pytest.approx(best, rel=0.01)
    assert abs(scale.young(cost, between) / best - 1) >= abs(scale.daly(cost, between) / best - 1)


def test_without_failures_and_with_a_network_that_is_no_limit_nothing_is_lost() -> None:
    found = scale.simulate(dataclasses.replace(QUIET, interruptions_per_machine_day=1e-9, checkpoint_blocked=1e-9))
    assert found.failures == 0 and found.step == pytest.approx(1, abs=1e-6)
    assert found.wall == pytest.approx(scale.size(QUIET).ideal, rel=1e-6)


@pytest.mark.parametrize("interval", [120.0, 600.0, 3000.0])
def test_failures_cost_what_the_formula_says(interval: float) -> None:
    plan = dataclasses.replace(QUIET, interruptions_per_machine_day=0.5, checkpoint_blocked=10.0)
    runs = [scale.simulate(plan, interval=interval, seed=seed) for seed in range(40)]
    expected = scale.efficiency(interval, 10.0, plan.restart, scale.size(plan).mean_time_between)
    shares = [run.step for run in runs]
    assert (
        np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / len(runs) ** 0.5) and np.std(shares) < 0.1
    )
    for run in runs:
        assert run.step + run.data + run.save + run.recovery == pytest.approx(1, abs=1e-9)


def test_data_costs_bytes_by_bandwidth() -> None:
    plan = dataclasses.replace(
        scale.LARGE, each_reads_all=False, store_bandwidth=1e9, interruptions_per_machine_day=1e-9
    )
    found = scale.simulate(plan, jitter=0.0)
    assert found.wall == pytest.approx(plan.images * plan.epochs * plan.bytes_per_image / 1e9, rel=0.01)
    assert found.step == pytest.approx(scale.size(plan).goodput, rel=0.01)


def test_a_simulation_is_repeated_exactly_and_another_seed_is_another_run() -> None:
    plan = dataclasses.replace(scale.LARGE, interruptions_per_machine_day=0.25)
    first, again, other = (scale.simulate(plan, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_model_agrees_with_what_was_measured_here() -> None:
    """The digits' run of 2026-11-23 (metrics/pretrain.json of d9cff49): its share in steps is its images by its rate."""
    images, rate, goodput, wall = 63488, 305.15, 0.7936, 260.0
    assert images / rate == pytest.approx(goodput * wall, rel=0.02)


def test_the_page_is_not_stale() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    assert scale.page(text) == text, "run `make scale`"
