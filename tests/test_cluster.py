import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from darkmatter import cluster

ROOT = Path(__file__).parent.parent
SCRIPT = """
from darkmatter import cluster
with cluster.session():
    import ray
    assert len(ray.nodes()) == 1
    products = list(cluster.map_tasks(lambda a, b: a * b, [(2, 3), (4, 5)], "multiplying"))
    print(products, ray.get_runtime_context().gcs_address)
"""


def test_tasks_come_back_in_order(ray_session: None) -> None:
    tasks = [(number, 7) for number in range(20)]
    assert list(cluster.map_tasks(lambda a, b: (a // b, a % b), tasks, "x")) == [divmod(a, b) for a, b in tasks]


def test_an_exception_of_a_task_is_raised_here(ray_session: None) -> None:
    with pytest.raises(ZeroDivisionError):
        list(cluster.map_tasks(lambda a, b: a / b, [(1, 1), (1, 0)], "x"))


def test_with_ray_address_it_attaches_and_leaves_the_cluster_running(ray_session: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip().endswith(f"[6, 20] {address}")


def test_a_cluster_of_its_own_writes_no_token_to_disk(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "[6, 20]" in run.stdout
    assert not list(tmp_path.rglob("auth_token")), [oct(stat.S_IMODE(p.stat().st_mode)) for p in tmp_path.rglob("*")]


def test_without_the_token_nobody_gets_in(ray_session: None) -> None:
    import ray

    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**stranger, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0
    assert "Auth" in run.stderr


def make_place(**changes: Any) -> cluster.PlaceConfig:
    """As in params.yaml, but for the changes."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())["place"]
    return cluster.PlaceConfig(**{**values, "workers": 1, "cpus_per_worker": 1, "gpu": False, **changes})


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"workers": 999, "cpus_per_worker": 2}, "1998 CPUs"), ({"workers": 999, "gpu": True}, "999 GPUs")],
)
def test_more_than_the_machine_has_is_refused_and_not_waited_for(change: dict, kind: str, ray_session: None) -> None:
    with pytest.raises(ValueError, match=f"place asks for {kind}"):
        cluster.train(lambda job, device: None, {}, make_place(**change), name="never")


def test_a_worker_keeps_the_memory_of_one_step_for_the_next(tmp_path: Path, ray_session: None) -> None:
    def work(job: dict[str, Any], device: torch.device) -> None:
        def step() -> None:
            torch.empty(16, 2**20).fill_(0.0)  # 64 MiB, 16,384 pages

        for _ in range(10):
            step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            step()
        (tmp_path / "faults").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))

    cluster.train(work, {}, make_place(storage=str(tmp_path / "storage")), name="faults")
    assert int((tmp_path / "faults").read_text()) < 16_384
