import copy
from pathlib import Path
from typing import Any

import pytest
import trained
from safetensors.torch import load_file, save_file

from darkmatter.registry import Champion, RegisterConfig, gate

CONFIG = RegisterConfig(model="m", protocol="5-way 5-shot", min_energy_margin=0.9)
CURRENT = Champion(version="3", weights_sha256="w3", source="")


def changed(path: str, value: Any) -> dict[str, Any]:
    scores = copy.deepcopy(trained.SCORES)
    *parents, last = path.split("/")
    place = scores
    for name in parents:
        place = place[name]
    place[last] = value
    return scores


def failed(folder: Path, scores: dict[str, Any]) -> dict[str, str]:
    trained.save(folder)
    return {rule.name: rule.reason for rule in gate.to_register(folder, scores, CONFIG) if not rule.passed}


def test_a_healthy_model_passes_every_rule(tmp_path: Path) -> None:
    assert failed(tmp_path / "m", trained.SCORES) == {}
    assert len(gate.to_register(tmp_path / "m", trained.SCORES, CONFIG)) == 4


def test_a_collapsed_model_is_refused_with_its_margin(tmp_path: Path) -> None:
    reasons = failed(tmp_path / "m", changed("energy_margin/auroc/pretrained/mean", 0.52))
    assert reasons == {"not collapsed": "energy margin 0.5200 < 0.9"}


def test_a_model_whose_margin_was_not_measured_is_refused(tmp_path: Path) -> None:
    scores = {name: value for name, value in trained.SCORES.items() if name != "energy_margin"}
    assert failed(tmp_path / "m", scores) == {"not collapsed": "not measured: params.yaml lacks evaluate.energy_margin"}


@pytest.mark.parametrize("subject", ["untrained", "pixels"])
def test_a_difference_whose_interval_holds_zero_is_refused(subject: str, tmp_path: Path) -> None:
    scores = changed(f"few_shot/5-way 5-shot/advantage/{subject}", {"mean": 0.009, "ci95": 0.01})
    reasons = failed(tmp_path / "m", scores)
    assert list(reasons) == [f"better than {subject}"]
    assert "+0.90% ± 1.00%" in reasons[f"better than {subject}"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    trained.save(tmp_path / "m")
    path = tmp_path / "m" / "backbone.safetensors"
    weights = load_file(path)
    weights["network.layers.1.0.weight"][0, 0, 0, 0] = value
    save_file(weights, path)
    reasons = {
        rule.name: rule.reason for rule in gate.to_register(tmp_path / "m", trained.SCORES, CONFIG) if not rule.passed
    }
    assert reasons == {"finite weights": "backbone.safetensors: network.layers.1.0.weight is not finite"}


def test_a_protocol_that_was_not_measured_is_refused_with_what_was(tmp_path: Path) -> None:
    scores = changed("few_shot", {"3-way 1-shot": {}})
    assert "there is: 3-way 1-shot" in failed(tmp_path / "m", scores)["better than pixels"]


def test_a_protocol_that_could_not_be_measured_is_refused_with_the_reason(tmp_path: Path) -> None:
    scores = changed("few_shot", {"5-way 5-shot": {"skipped": "2 classes have 20 labelled test samples"}})
    assert "could not be measured: 2 classes" in failed(tmp_path / "m", scores)["better than pixels"]


def test_without_labels_the_label_free_rules_decide(tmp_path: Path) -> None:
    scores = changed("labelled", 0)
    assert failed(tmp_path / "m", scores) == {}
    assert not gate.to_be_champion({**scores, "champion_version": "3"}, CONFIG, CURRENT, "w4").passed


@pytest.mark.parametrize(("difference", "passes"), [(0.02, True), (0.009, False), (-0.05, False)])
def test_champion_is_replaced_only_by_the_better(difference: float, passes: bool) -> None:
    rule = gate.to_be_champion(trained.beside_champion("3", difference), CONFIG, CURRENT, "w4")
    assert rule.passed is passes


def test_without_a_champion_any_registered_model_becomes_it() -> None:
    assert gate.to_be_champion(trained.SCORES, CONFIG, None, "w").passed


def test_the_champions_own_weights_stay_champion() -> None:
    assert gate.to_be_champion(trained.beside_champion("3", 0.0), CONFIG, CURRENT, "w3").passed


def test_a_comparison_with_a_former_champion_does_not_count() -> None:
    rule = gate.to_be_champion(trained.beside_champion("2", 0.5), CONFIG, CURRENT, "w4")
    assert not rule.passed
    assert "beside champion 2, but it is 3 now; dvc repro --force evaluate" in rule.reason
