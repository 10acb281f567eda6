"""The gate: may this model be registered, and may it be champion? Each rule answers with its reason."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from darkmatter.registry import Champion, RegisterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    name: str
    passed: bool
    reason: str


def to_register(model_folder: Path, scores: Mapping[str, Any], config: RegisterConfig) -> list[Rule]:
    """The rules that a model must pass to become a version at all."""
    return [
        _finite(model_folder),
        not_collapsed(scores, config),
        _better_than(scores, config, "untrained"),
        _better_than(scores, config, "pixels"),
    ]


def to_be_champion(
    scores: Mapping[str, Any], config: RegisterConfig, current: Champion | None, weights_sha256: str
) -> Rule:
    """The rule that decides on the alias, with the champion as it is now and as evaluate compared it."""
    name = "beats the champion"
    if current is None:
        return Rule(name=name, passed=True, reason="there is no champion yet")
    if current.weights_sha256 == weights_sha256:
        return Rule(
            name=name, passed=True, reason=f"these weights are the champion already (version {current.version})"
        )
    if scores.get("champion_version") != current.version:
        compared = scores.get("champion_version") or "none"
        reason = f"evaluated beside champion {compared}, but it is {current.version} now; dvc repro --force evaluate"
        return Rule(name=name, passed=False, reason=reason)
    return dataclasses.replace(_better_than(scores, config, "champion"), name=name)


def _finite(model_folder: Path) -> Rule:
    for file in ("backbone.safetensors", "objective.safetensors"):
        for tensor_name, tensor in load_file(model_folder / file).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return Rule(name="finite weights", passed=False, reason=f"{file}: {tensor_name} is not finite")
    return Rule(name="finite weights", passed=True, reason="every weight is a finite number")


def not_collapsed(scores: Mapping[str, Any], config: RegisterConfig) -> Rule:
    """The energy of the test split tells compatible pairs from others."""
    if "energy_margin" not in scores:
        return Rule(name="not collapsed", passed=False, reason="not measured: params.yaml lacks evaluate.energy_margin")
    margin = scores["energy_margin"]["auroc"]["pretrained"]["mean"]
    passed = margin >= config.min_energy_margin
    sign = ">=" if passed else "<"
    return Rule(
        name="not collapsed", passed=passed, reason=f"energy margin {margin:.4f} {sign} {config.min_energy_margin}"
    )


def _better_than(scores: Mapping[str, Any], config: RegisterConfig, subject: str) -> Rule:
    """By the paired difference over the same episodes: its 95% interval must lie above zero."""
    name = f"better than {subject}"
    few_shot = scores.get("few_shot", {})
    if not scores["labelled"]:
        return Rule(name=name, passed=subject != "champion", reason="cannot be decided: the test split has no labels")
    if config.protocol not in few_shot:
        known = ", ".join(few_shot) or "none"
        return Rule(name=name, passed=False, reason=f"there is no protocol {config.protocol!r} (there is: {known})")
    table = few_shot[config.protocol]
    if "skipped" in table:
        return Rule(name=name, passed=False, reason=f"{config.protocol} could not be measured: {table['skipped']}")
    ours, theirs, gap = table["pretrained"], table[subject], table["advantage"][subject]
    passed = gap["mean"] - gap["ci95"] > 0
    reason = (
        f"{config.protocol}: {ours['mean']:.2%} against {theirs['mean']:.2%}, "
        f"difference {gap['mean']:+.2%} ± {gap['ci95']:.2%}"
    )
    return Rule(name=name, passed=passed, reason=reason)
