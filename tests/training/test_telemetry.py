"""What Prometheus sees of a run: a real Ray, its metrics port, and a training that is scraped while it goes on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from darkmatter.training import telemetry

SCRIPT = """
import sys
from pathlib import Path
import runs
from darkmatter import cluster
from darkmatter.console import Preempted
from darkmatter.training import pretrain
digits, folder = map(Path, sys.argv[1:])
config = runs.CONFIG.model_copy(update={"epochs": 2000, "save_every": 500, "health_every": 20, "min_energy_margin": 0.5})
try:
    with cluster.session():
        place = runs.place(folder, workers=1)
        pretrain.pretrain(digits / "train", runs.spec(digits / "train", "simclr"), config, place,
                          out=folder / "model", plot=folder / "history.csv")
except Preempted:
    pass
"""


def test_a_row_becomes_numbers_and_what_it_lacks_is_left_as_it_was() -> None:
    row = {
        "step": 40, "loss": 2.5, "images_per_second": 99.0, "seconds_step": 6.0, "seconds_data": 3.0,
        "seconds_evaluation": 0.0, "seconds_save": 1.0, "time": 1e9, "session": 1e8, "some_term": 7.0,
    }  # fmt: skip
    found = telemetry.numbers(row)
    assert found == {
        "darkmatter_step": 40, "darkmatter_loss": 2.5, "darkmatter_images_per_second": 99.0,
        "darkmatter_data_wait_ratio": 0.3, "darkmatter_last_row_timestamp_seconds": 1e9,
    }  # fmt: skip
    assert set(found) <= set(telemetry.NUMBERS)


@contextlib.contextmanager
def training(digits: Path, folder: Path, ray_folder: Path) -> Iterator[subprocess.Popen]:
    """One that goes on until the block ends, on a Ray of its own."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
        "TMPDIR": str(ray_folder),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(digits), str(folder)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, errors[-3000:]


def scrape(ray_folder: Path) -> dict[str, dict[str, float]]:
    """Of each number its value by label set, from every port that Ray names in the file that Prometheus is to read."""
    found: dict[str, dict[str, float]] = {}
    for path in ray_folder.rglob("prom_metrics_service_discovery.json"):
        for target in (target for group in json.loads(path.read_text()) for target in group["targets"]):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if not line.startswith("#"):
                        name, _, rest = line.partition("{")
                        labels, _, value = rest.rpartition("} ")
                        found.setdefault(name, {})[labels] = float(value or "nan")
    return found


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets allow paths of about a hundred letters
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_prometheus_finds_every_number_of_a_run_while_it_trains(digits: Path, tmp_path: Path, ray_folder: Path) -> None:
    wanted = {f"ray_{name}" for name in telemetry.NUMBERS}
    with training(digits, tmp_path, ray_folder) as process:
        deadline = time.monotonic() + 800  # of a test that hangs
        while wanted - (found := scrape(ray_folder)).keys():
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < deadline, f"not there: {sorted(wanted - found.keys())}"
            time.sleep(0.5)
    fingerprint = next((tmp_path / "storage").glob("pretrain-*")).name.removeprefix("pretrain-")
    value = {name: next(iter(found[name].values())) for name in wanted}
    for name in wanted:
        assert f'run="{fingerprint}"' in next(iter(found[name])) and 'objective="simclr"' in next(iter(found[name]))
    assert value["ray_darkmatter_energy_margin_floor"] == 0.5 < value["ray_darkmatter_energy_margin"] <= 1.0
    assert 0 < value["ray_darkmatter_step"] < value["ray_darkmatter_steps_planned"] and value["ray_darkmatter_loss"] > 0
    assert 0 < value["ray_darkmatter_goodput_ratio"] < 1 and 0 <= value["ray_darkmatter_data_wait_ratio"] < 1
    assert value["ray_darkmatter_workers"] == 1 and value["ray_darkmatter_images_per_second"] > 0
    assert abs(time.time() - value["ray_darkmatter_last_row_timestamp_seconds"]) < 600
