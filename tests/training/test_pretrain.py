"""The stage on a real Ray: two workers over gloo, one of them killed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import runs
from safetensors.torch import load_file

from darkmatter import cluster, health, lineage, shards
from darkmatter.cluster import PlaceConfig
from darkmatter.training import history, pretrain

TIMES = ("images_per_second", "goodput", "wall_seconds", "lost_to")
CONFIG = runs.CONFIG.model_copy(update={"epochs": 12, "save_every": 10, "health_every": 60})


def place(storage: Path, **changes: object) -> PlaceConfig:
    values = {
        "workers": 2, "cpus_per_worker": 1, "gpu": False, "storage": str(storage), "data": "", "max_restarts": 2,
        "cache": str(storage / "cache"), "cache_gibibytes": 1.0, "stall_seconds": 60.0, "keep_checkpoints": 2,
        "mlflow": "sqlite:///unused.db",
    }  # fmt: skip
    return PlaceConfig(**{**values, **changes})


def run(digits: Path, folder: Path, **where: object) -> dict:
    spec, here = runs.spec(digits / "train", "simclr"), place(folder / "storage", **where)
    return pretrain.pretrain(digits / "train", spec, CONFIG, here, out=folder / "model", plot=folder / "history.csv")


def kill_a_worker_after(storage: Path, step: int, killed: list[int]) -> None:
    while not killed:
        rows = [row for folder in storage.glob("pretrain-*") for row in history.read(str(folder))]
        if rows and rows[-1]["step"] >= step:
            workers = [
                child
                for child in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join(child.cmdline())
            ]
            os.kill(workers[-1].pid, signal.SIGKILL)
            killed.append(workers[-1].pid)
        time.sleep(0.02)


def test_a_killed_worker_costs_nothing_but_time(digits: Path, tmp_path: Path, ray_session: None) -> None:
    """Nor does it matter where data comes from: the run that is not killed streams it."""
    reference = run(digits, tmp_path / "whole", data=str(tmp_path / "sent"))
    cached = {path.stem for path in (tmp_path / "whole" / "storage" / "cache").glob("*.tar")}
    assert cached == {shard.sha256 for shard in shards.Manifest.load(digits / "train").shards}
    killed: list[int] = []
    watcher = threading.Thread(
        target=kill_a_worker_after, args=(tmp_path / "killed" / "storage", 25, killed), daemon=True
    )
    watcher.start()
    summary = run(digits, tmp_path / "killed")
    watcher.join(1)
    assert killed
    for name in ("backbone.safetensors", "objective.safetensors"):
        whole, resumed = (load_file(tmp_path / run / "model" / name) for run in ("whole", "killed"))
        assert all((resumed[key] == value).all() for key, value in whole.items())
    assert {**summary, **dict.fromkeys(TIMES, 0)} == {**reference, **dict.fromkeys(TIMES, 0)}
    assert summary["lost_to"]["recovery"] > 0 == reference["lost_to"]["recovery"]
    for one in (summary, reference):
        assert sum(one["lost_to"].values()) + one["goodput"] == pytest.approx(1, abs=0.01)
    rows = (tmp_path / "killed" / "history.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[0]) for row in rows] == list(range(1, summary["steps"] + 1))


def test_fingerprint_names_everything_that_decides_the_result(digits: Path) -> None:
    manifest = shards.Manifest.load(digits / "train")
    spec = runs.spec(digits / "train", "simclr")
    base = pretrain.run_fingerprint(manifest, spec, CONFIG)
    assert base == pretrain.run_fingerprint(manifest, spec, CONFIG)
    others = [
        pretrain.run_fingerprint(manifest, spec, CONFIG.model_copy(update={"learning_rate": 0.1})),
        pretrain.run_fingerprint(manifest, spec.model_copy(update={"views": {"name": "natural"}}), CONFIG),
        pretrain.run_fingerprint(manifest, runs.spec(digits / "train", "vicreg"), CONFIG),
        pretrain.run_fingerprint(shards.Manifest(classes=None, shards=manifest.shards[1:]), spec, CONFIG),
    ]
    assert len({base, *others}) == 5


def test_options_of_methods_that_are_not_chosen_do_not_start_a_run_afresh(digits: Path) -> None:
    manifest = shards.Manifest.load(digits / "train")
    spec = runs.spec(digits / "train", "simclr")
    waiting = spec.model_copy(update={"objective": {**spec.objective, "vicreg": {"variance": 9.0}}})
    assert pretrain.run_fingerprint(manifest, waiting, CONFIG) == pretrain.run_fingerprint(manifest, spec, CONFIG)


def test_damaged_training_data_is_refused_before_training(digits: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(digits / "train", tmp_path / "train")
    path = next((tmp_path / "train").glob("train-*.tar"))
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(bytes(content))
    spec = runs.spec(digits / "train", "simclr")
    with pytest.raises(ValueError, match="is damaged"):
        pretrain.pretrain(
            tmp_path / "train", spec, CONFIG, place(tmp_path), out=tmp_path / "m", plot=tmp_path / "h.csv"
        )


@pytest.mark.parametrize(("batch", "message"), [(31, "cannot be shared evenly by 2 workers"), (9000, "over the")])
def test_an_impossible_batch_is_refused_before_training(batch: int, message: str, digits: Path, tmp_path: Path) -> None:
    spec, config = runs.spec(digits / "train", "simclr"), CONFIG.model_copy(update={"batch_size": batch})
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(digits / "train", spec, config, place(tmp_path), out=tmp_path / "m", plot=tmp_path / "h.csv")


def test_code_of_the_chosen_plugins_is_in_the_fingerprint() -> None:
    package = Path(lineage.__file__).parent
    imported = lineage.imported_files(package / "training" / "pretrain.py")
    assert package / "objectives" / "simclr.py" not in imported  # so that it must be, and is, added by name
    assert package / "training" / "loop.py" in imported


def test_a_collapsed_run_ends_with_its_reason_at_once_the_second_time(
    digits: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = CONFIG.model_copy(update={"min_energy_margin": 0.999, "health_every": 10})
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", picky)
    with pytest.raises(health.Collapsed, match=r"collapse at step \d+") as first:
        run(digits, tmp_path)
    assert not (tmp_path / "model").exists()
    assert "energy_margin" in (tmp_path / "history.csv").read_text()
    monkeypatch.setattr(cluster, "train", lambda *_, **__: pytest.fail("trained again"))
    with pytest.raises(health.Collapsed) as second:
        run(digits, tmp_path)
    assert str(second.value) == str(first.value)
