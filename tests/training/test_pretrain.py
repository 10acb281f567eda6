"""The stage on a real Ray: two workers over gloo."""

import sys
from pathlib import Path

import pytest
import runs
import torch

from darkmatter import cluster, lineage, model, shards
from darkmatter.console import Stopped
from darkmatter.training import pretrain

CONFIG = runs.CONFIG.model_copy(update={"epochs": 12, "save_every": 10, "health_every": 60})


def run(digits: Path, folder: Path, **where: object) -> dict:
    spec, here = runs.spec(digits / "train", "simclr"), runs.place(folder, **where)
    return pretrain.pretrain(digits / "train", spec, CONFIG, here, out=folder / "model", plot=folder / "history.csv")


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
            tmp_path / "train", spec, CONFIG, runs.place(tmp_path), out=tmp_path / "m", plot=tmp_path / "h.csv"
        )


@pytest.mark.parametrize(("batch", "message"), [(31, "cannot be shared evenly by 2 "), (9000, "over the")])
def test_an_impossible_batch_is_refused_before_training(batch: int, message: str, digits: Path, tmp_path: Path) -> None:
    spec, config = runs.spec(digits / "train", "simclr"), CONFIG.model_copy(update={"batch_size": batch})
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(
            digits / "train", spec, config, runs.place(tmp_path), out=tmp_path / "m", plot=tmp_path / "h.csv"
        )


def test_a_warm_start_begins_with_the_weights_of_the_other_and_is_a_run_of_its_own(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, at a learning rate at which nothing moves."""
    spec = runs.spec(digits / "train", "simclr")
    model.save(tmp_path / "start", model.build(spec, seed=7), spec, {"seed": 7})
    still = CONFIG.model_copy(update={"epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-12})
    monkeypatch.setattr(cluster, "train", lambda work, job, place, name: work(job, torch.device("cpu")))
    summary = pretrain.pretrain(
        digits / "train", spec, still, runs.place(tmp_path, workers=1), out=tmp_path / "m", plot=tmp_path / "h.csv",
        start=tmp_path / "start",
    )  # fmt: skip
    trained, _, provenance = model.load(tmp_path / "m")
    start = model.build(spec, seed=7)
    pairs = zip(trained.parameters(), start.parameters(), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in pairs)
    assert provenance["started_from"] == model.digest(tmp_path / "start")
    manifest = shards.Manifest.load(digits / "train")
    assert summary["fingerprint"] != pretrain.run_fingerprint(manifest, spec, still)


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
    with pytest.raises(Stopped, match=r"collapse at step \d+.*remove .*stopped.txt") as first:
        run(digits, tmp_path)
    assert not (tmp_path / "model").exists()
    assert "energy_margin" in (tmp_path / "history.csv").read_text()
    monkeypatch.setattr(cluster, "train", lambda *_, **__: pytest.fail("trained again"))
    with pytest.raises(Stopped) as second:
        run(digits, tmp_path)
    assert str(second.value) == str(first.value)
