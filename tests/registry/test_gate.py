"""Every rule by itself. tests/registry/test_register.py has them in the stage."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trained
from safetensors.torch import load_file, save_file

from darkmatter.registry import Champion, RegisterConfig, gate
from darkmatter.registry.export import Difference

CONFIG = trained.CONFIG
CURRENT = Champion(version="3", weights_sha256="w3", source="", uri="")


def changed(path: str, value: Any) -> dict[str, Any]:
    scores = copy.deepcopy(trained.SCORES)
    *parents, last = path.split("/")
    place = scores
    for name in parents:
        place = place[name]
    place[last] = value
    return scores


def candidate(folder: Path, scores: dict[str, Any] = trained.SCORES) -> gate.Candidate:
    """A healthy one."""
    trained.save(folder)
    return gate.Candidate(
        folder=folder,
        provenance=trained.provenance(0),
        scores=trained.scores_of(folder, scores),
        commit="c" * 40,
        uncommitted=[],
        records=["dvc.lock", "requirements.lock"],
        source="builtin:mnist",
        ingested=trained.INGESTED,
    )


def broken(one: gate.Candidate, config: RegisterConfig = CONFIG) -> dict[str, str]:
    return {rule.name: rule.reason for rule in gate.to_register(one, config) if not rule.passed}


def failed(folder: Path, scores: dict[str, Any]) -> dict[str, str]:
    return broken(candidate(folder, scores))


def test_a_healthy_model_passes_every_rule(tmp_path: Path) -> None:
    rules = gate.to_register(candidate(tmp_path / "m"), CONFIG)
    assert [rule for rule in rules if not rule.passed] == []
    assert len({rule.name for rule in rules}) == 10


def test_a_collapsed_model_is_refused_with_its_margin(tmp_path: Path) -> None:
    reasons = failed(tmp_path / "m", changed("energy_margin/auroc/pretrained/mean", 0.52))
    assert reasons == {"not collapsed": "energy margin 0.5200 < 0.9"}


def test_a_model_whose_margin_was_not_measured_is_refused(tmp_path: Path) -> None:
    scores = {name: value for name, value in trained.SCORES.items() if name != "energy_margin"}
    assert failed(tmp_path / "m", scores) == {"not collapsed": "not measured: params.yaml lacks evaluate.energy_margin"}


def test_a_model_that_uses_few_dimensions_is_refused_with_their_number(tmp_path: Path) -> None:
    reasons = failed(tmp_path / "m", changed("rankme/rankme/pretrained/mean", 1.3))
    assert reasons == {"uses its dimensions": "RankMe 1.3 < 5.0"}
    scores = {name: value for name, value in trained.SCORES.items() if name != "rankme"}
    assert failed(tmp_path / "n", scores) == {"uses its dimensions": "not measured: params.yaml lacks evaluate.rankme"}


@pytest.mark.parametrize("subject", ["untrained", "pixels"])
def test_a_difference_whose_interval_holds_zero_is_refused(subject: str, tmp_path: Path) -> None:
    scores = changed(f"few_shot/5-way 5-shot/advantage/{subject}", {"mean": 0.009, "ci95": 0.01})
    reasons = failed(tmp_path / "m", scores)
    assert list(reasons) == [f"better than {subject}"]
    assert "+0.90% ± 1.00%" in reasons[f"better than {subject}"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["backbone", "objective"])
def test_a_weight_that_is_not_finite_is_refused_by_name(file: str, value: float, tmp_path: Path) -> None:
    one = candidate(tmp_path / "m")
    path = tmp_path / "m" / f"{file}.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("weight"))
    weights[name].view(-1)[0] = value
    save_file(weights, path)
    one = dataclasses.replace(one, scores=trained.scores_of(tmp_path / "m"))
    assert broken(one) == {"finite weights": f"{file}.safetensors: {name} is not finite"}


@pytest.mark.parametrize("file", ["backbone.safetensors", "objective.safetensors", "config.json"])
def test_a_model_that_was_changed_after_it_was_evaluated_is_refused(file: str, tmp_path: Path) -> None:
    one = candidate(tmp_path / "m")
    path = tmp_path / "m" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reasons = broken(one)
    assert list(reasons) == ["as evaluated"]
    assert "changed since; dvc repro --force evaluate" in reasons["as evaluated"]


def test_scores_that_do_not_name_their_model_are_refused(tmp_path: Path) -> None:
    one = dataclasses.replace(candidate(tmp_path / "m"), scores=trained.SCORES)
    assert "do not say which model" in broken(one)["as evaluated"]


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


def test_what_is_not_committed_is_refused_by_name_with_what_to_do(tmp_path: Path) -> None:
    one = dataclasses.replace(candidate(tmp_path / "m"), uncommitted=["params.yaml", "components/new.py"])
    reasons = broken(one)
    assert list(reasons) == ["committed"]
    for words in ("params.yaml, components/new.py", "git commit, then dvc repro", "register.allow_dirty: true"):
        assert words in reasons["committed"]
    allowed = CONFIG.model_copy(update={"allow_dirty": True})
    assert broken(one, allowed) == {}
    (told,) = [rule.reason for rule in gate.to_register(one, allowed) if rule.name == "committed"]
    assert "params.yaml, components/new.py" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": None}, "no a git commit"),
        ({"records": ["requirements.lock"]}, "no the file dvc.lock"),
        ({"records": ["dvc.lock"]}, "no the file requirements.lock"),
        ({"provenance": {"seed": 0}}, "no training_data in the model's config.json"),
    ],
    ids=["commit", "dvc.lock", "requirements.lock", "provenance"],
)
def test_a_model_of_unknown_origin_is_refused_with_what_is_missing(change: dict, words: str, tmp_path: Path) -> None:
    reasons = broken(dataclasses.replace(candidate(tmp_path / "m"), **change))
    assert list(reasons) == ["lineage complete"]
    assert words.removeprefix("no ") in reasons["lineage complete"]


@pytest.mark.parametrize("key", list(trained.CARD.model_dump()))
def test_a_card_with_an_empty_part_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"card": trained.CARD.model_copy(update={key: "  "})})
    reasons = broken(candidate(tmp_path / "m"), config)
    assert reasons == {"card complete": f"empty in params.yaml: register.card.{key}"}


def test_a_card_that_was_written_for_another_source_is_refused(tmp_path: Path) -> None:
    one = dataclasses.replace(candidate(tmp_path / "m"), source="folder:/data/photos")
    reason = broken(one)["card complete"]
    assert "written for builtin:mnist, but source.uri is folder:/data/photos" in reason


@pytest.mark.parametrize("largest", [0.002, float("nan"), float("inf")])
def test_a_program_that_is_far_from_the_network_is_refused_by_name(largest: float) -> None:
    near = Difference(program="near", largest=1e-6, scale=10.0)
    far = Difference(program="far", largest=largest, scale=10.0)
    assert gate.programs_agree([near], 8, CONFIG).passed
    rule = gate.programs_agree([near, far], 8, CONFIG)
    assert not rule.passed
    assert f"far {largest:.1e}" in rule.reason
    assert "near" not in rule.reason
    assert not gate.programs_agree([dataclasses.replace(near, scale=float("inf"))], 8, CONFIG).passed


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


def shifted(folder: Path, **changes: Any) -> gate.Rule:
    """The rule on data: `changes` came to those of the version before, all else stayed."""
    now = copy.deepcopy(trained.INGESTED)
    for name, change in changes.items():
        now[name] = {**now[name], **change} if isinstance(change, dict) else change
    before = gate.Before(version="3", source="builtin:mnist", ingested=trained.INGESTED)
    one = dataclasses.replace(candidate(folder), ingested=now, before=before)
    return gate.data_as_before(one, CONFIG)


def test_new_files_like_those_before_pass(tmp_path: Path) -> None:
    rule = shifted(tmp_path / "m", samples_by_class={"0": 72, "1": 48}, rejects_by_reason={"truncated": 4})
    assert rule.passed
    assert rule.reason.startswith("21 files came since version 3")
    assert shifted(tmp_path / "n").reason == "no file came since version 3"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples_by_class": {"0": 75, "1": 50}, "rejects_by_reason": {"truncated": 28}}, "rejected as truncated 50%"),
        ({"samples_by_class": {"0": 60, "1": 90}}, "class 1 100% (before 38%)"),
        ({"samples_by_class": {"0": 75, "1": 50}, "duplicates": 27}, "duplicates 50% (before 2%)"),
    ],
    ids=["half of it corrupt", "one class only", "half of it repeated"],
)
def test_poisoned_new_files_are_refused_by_what_they_became(changes: dict, named: str, tmp_path: Path) -> None:
    rule = shifted(tmp_path / "m", **changes)
    assert not rule.passed
    assert named in rule.reason


def test_few_new_files_are_not_refused_for_what_chance_does(tmp_path: Path) -> None:
    """Four of one class: a share of 1 instead of 0.57, as one time in ten."""
    assert shifted(tmp_path / "m", samples_by_class={"0": 64, "1": 40}).passed


def test_data_of_another_source_are_not_compared(tmp_path: Path) -> None:
    before = gate.Before(version="3", source="folder:/other", ingested={})
    one = dataclasses.replace(candidate(tmp_path / "m"), before=before)
    assert gate.data_as_before(one, CONFIG).passed
