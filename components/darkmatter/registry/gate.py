"""The gate: may this model be registered, and may it be champion? Each rule answers with its reason."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from darkmatter import model
from darkmatter.registry import CardConfig, Champion, RegisterConfig
from darkmatter.registry.export import Difference

#: Without these nobody can say what a version came from.
RECORDS = ("dvc.lock", "requirements.lock")
_PROVENANCE = ("fingerprint", "training_data", "training_samples", "seed", "steps", "versions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    name: str
    passed: bool
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What comes before the gate."""

    folder: Path
    """What pretrain wrote."""
    provenance: Mapping[str, Any]
    """Of its config.json."""
    scores: Mapping[str, Any]
    """What evaluate wrote."""
    commit: str | None
    """Of Git."""
    uncommitted: Sequence[str]
    """Files of code and params that differ from it."""
    records: Collection[str]
    """Names of the files that would be kept in the version."""
    source: str
    """`source.uri`."""
    ingested: Mapping[str, Any]
    """What ingest counted."""
    before: "Before | None" = None
    """The data of the version that passed the gate last, if there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Before:
    version: str
    source: str
    ingested: Mapping[str, Any]


def to_register(candidate: Candidate, config: RegisterConfig) -> list[Rule]:
    """The rules that a model must pass before a version is made of it."""
    return [
        data_as_before(candidate, config),
        _finite(candidate.folder),
        _as_evaluated(candidate),
        not_collapsed(candidate.scores, config),
        _uses_dimensions(candidate.scores, config),
        _better_than(candidate.scores, config, "untrained"),
        _better_than(candidate.scores, config, "pixels"),
        _committed(candidate, config),
        _lineage_complete(candidate),
        _card_complete(candidate, config.card),
    ]


def programs_agree(differences: Sequence[Difference], num_images: int, config: RegisterConfig) -> Rule:
    """What a version would run gives what was evaluated, on real images."""
    limit = config.max_program_difference
    wrong = [one for one in differences if not one.within(limit)]
    told = ", ".join(f"{one.program} {one.largest:.1e} of {one.scale:.3g}" for one in wrong or differences)
    verb = "more than" if wrong else "at most"
    reason = f"largest difference on {num_images} real images {verb} {limit:g} of the largest number: {told}"
    return Rule(name="programs agree", passed=not wrong, reason=reason)


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


def _as_evaluated(candidate: Candidate) -> Rule:
    name = "as evaluated"
    measured = candidate.scores.get("model_sha256")
    if measured != model.digest(candidate.folder):
        what = "another model folder was evaluated" if measured else "the scores do not say which model they are of"
        return Rule(
            name=name, passed=False, reason=f"{what}, or this one was changed since; dvc repro --force evaluate"
        )
    return Rule(name=name, passed=True, reason=f"the model folder that was evaluated, {measured[:12]}")


def data_as_before(candidate: Candidate, config: RegisterConfig) -> Rule:
    """Of the files that came since the newest version was made became what became of those before: the same shares of each
    class, of duplicates and of each reason for a reject.

    The distance is half the sum of the differences of the shares (total variation), less what chance gives for so few files:
    the mean absolute deviation of a binomial share is sqrt(2 p (1 - p) / (pi n)), in the normal approximation.
    """
    name, before = "data as before", candidate.before
    if before is None:
        return Rule(name=name, passed=True, reason="there is no version whose data to compare with")
    if before.source != candidate.source:
        reason = f"version {before.version} was trained on another source, {before.source}"
        return Rule(name=name, passed=True, reason=reason)
    both = (before.ingested, candidate.ingested)
    labelled = all(one.get("samples_by_class") for one in both)
    old, now = (_outcomes(one, labelled=labelled) for one in both)
    new = {what: max(0, count - old.get(what, 0)) for what, count in now.items()}
    files, files_before = sum(new.values()), sum(old.values())
    if not files:
        return Rule(name=name, passed=True, reason=f"no file came since version {before.version}")
    shares = {what: (new.get(what, 0) / files, old.get(what, 0) / files_before) for what in {**old, **new}}
    chance = sum(math.sqrt(2 * p * (1 - p) / (math.pi * files)) for _, p in shares.values()) / 2
    shift = max(0.0, sum(abs(q - p) for q, p in shares.values()) / 2 - chance)
    passed = shift <= config.max_data_shift
    told = f"{files:,} files came since version {before.version}; "
    told += f"what became of them differs by {shift:.2f} {'<=' if passed else '>'} {config.max_data_shift}"
    if not passed:
        worst = sorted(shares.items(), key=lambda one: one[1][1] - one[1][0])[:3]
        told += ": " + ", ".join(f"{what} {q:.0%} (before {p:.0%})" for what, (q, p) in worst if q > p)
        told += ". Mend the source (ingest.drop_removed takes out what is gone), or allow it: register.max_data_shift"
    return Rule(name=name, passed=passed, reason=told)


def _outcomes(ingested: Mapping[str, Any], *, labelled: bool) -> dict[str, int]:
    """How many files became what."""
    samples = {f"class {label}": count for label, count in ingested["samples_by_class"].items()} if labelled else {}
    rejects = {f"rejected as {reason}": count for reason, count in ingested["rejects_by_reason"].items()}
    repeated = {"duplicates": ingested["duplicates"] + ingested["near_duplicates"]}
    return {**(samples or {"samples": ingested["samples"]}), **repeated, **rejects}


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


def _uses_dimensions(scores: Mapping[str, Any], config: RegisterConfig) -> Rule:
    name = "uses its dimensions"
    if "rankme" not in scores:
        return Rule(name=name, passed=False, reason="not measured: params.yaml lacks evaluate.rankme")
    rank = scores["rankme"]["rankme"]["pretrained"]["mean"]
    passed = rank >= config.min_rankme
    return Rule(name=name, passed=passed, reason=f"RankMe {rank:.1f} {'>=' if passed else '<'} {config.min_rankme}")


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


def _committed(candidate: Candidate, config: RegisterConfig) -> Rule:
    name, changed = "committed", ", ".join(candidate.uncommitted)
    if not changed:
        return Rule(name=name, passed=True, reason="code and params are those of the commit")
    if config.allow_dirty:
        return Rule(name=name, passed=True, reason=f"allowed by register.allow_dirty, and recorded: {changed}")
    todo = "git add and git commit, then dvc repro (nothing is trained again); or register.allow_dirty: true"
    return Rule(name=name, passed=False, reason=f"not those of the commit: {changed}; {todo}")


def _lineage_complete(candidate: Candidate) -> Rule:
    missing = [] if candidate.commit else ["a git commit (is this a repository, with one?)"]
    missing += [f"the file {name}" for name in RECORDS if name not in candidate.records]
    missing += [f"{name} in the model's config.json" for name in _PROVENANCE if name not in candidate.provenance]
    if missing:
        return Rule(name="lineage complete", passed=False, reason=f"there is no {'; no '.join(missing)}")
    data = candidate.provenance["training_data"]
    reason = f"commit {str(candidate.commit)[:12]}, data {data[:12]}, run {candidate.provenance['fingerprint']}"
    return Rule(name="lineage complete", passed=True, reason=reason)


def _card_complete(candidate: Candidate, card: CardConfig) -> Rule:
    name = "card complete"
    empty = [f"register.card.{key}" for key, text in card.model_dump().items() if not text.strip()]
    if empty:
        return Rule(name=name, passed=False, reason=f"empty in params.yaml: {', '.join(empty)}")
    if card.written_for != candidate.source:
        reason = (
            f"register.card was written for {card.written_for}, but source.uri is {candidate.source}: "
            "write what this model is, then change register.card.written_for"
        )
        return Rule(name=name, passed=False, reason=reason)
    return Rule(name=name, passed=True, reason=f"intended use, limits, data and licence ({card.licence}) are said")
