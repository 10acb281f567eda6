import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "registry"))
import trained

from darkmatter import model


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    spec = trained.save(tmp_path / "m", seed=5)
    loaded, loaded_spec, provenance = model.load(tmp_path / "m")
    assert loaded_spec == spec
    assert provenance["seed"] == 5
    assert not loaded.training
    fresh = model.build(spec, seed=5)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in fresh.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "backbone.safetensors", "config.json", "objective.safetensors",
    ]  # fmt: skip


def test_weights_follow_the_seed_and_building_leaves_the_generator_alone(tmp_path: Path) -> None:
    spec = trained.save(tmp_path / "m")
    state = torch.get_rng_state()
    first, second, other = (model.build(spec, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "projector.0.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    trained.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["backbone"]["small_conv"]["width"] = 8
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        model.load(tmp_path / "m")
    config["format"] = 9
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format 9; this version reads 2"):
        model.load(tmp_path / "m")


def test_a_warm_start_takes_the_weights_and_keeps_its_own_statistics(tmp_path: Path) -> None:
    spec = trained.save(tmp_path / "m", seed=5)
    grown = spec.model_copy(update={"images": spec.images.model_copy(update={"mean": [0.2]}), "num_samples": 120})
    objective = model.build(grown, seed=0)
    assert model.take_over(objective, grown, tmp_path / "m") == []
    ours, theirs = objective.state_dict(), model.load(tmp_path / "m")[0].state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"backbone.mean"}
    assert objective.backbone.mean.item() == pytest.approx(0.2)


def test_a_memory_of_each_sample_starts_anew_when_there_are_more(tmp_path: Path) -> None:
    options = {"name": "npid", "npid": importlib.import_module("test_npid").SMALL}
    spec = trained.save(tmp_path / "m", seed=5, objective=options)
    grown = spec.model_copy(update={"num_samples": 120})
    objective = model.build(grown, seed=0)
    fresh = objective.state_dict()["memory.bank.rows"].clone()
    assert model.take_over(objective, grown, tmp_path / "m") == ["memory.bank.rows"]
    assert torch.equal(objective.state_dict()["memory.bank.rows"], fresh)
    theirs = model.load(tmp_path / "m")[0]
    assert all(torch.equal(one, two) for one, two in zip(objective.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("backbone", {"name": "small_conv", "small_conv": {"width": 8}}),
        ("objective", {"name": "simclr", "simclr": {"projector": [16, 9]}}),
    ],
)
def test_a_warm_start_from_a_model_of_another_kind_is_refused(section: str, value: dict, tmp_path: Path) -> None:
    spec = trained.save(tmp_path / "m")
    other = spec.model_copy(update={section: value})
    with pytest.raises(ValueError, match=f"a warm start needs the {section} of"):
        model.take_over(model.build(other, seed=0), other, tmp_path / "m")
