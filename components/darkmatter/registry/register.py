"""The stage: a model and its scores -> a version in the registry, or the rules that it broke."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from darkmatter import files, lineage, model, tracking
from darkmatter.registry import INSIDE, RegisterConfig, aliases, champion, find, gate, package, record_of, seal

Decision = dict[str, Any]


def register(
    model_folder: Path,
    scores: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    params: Mapping[str, Any],
    config: RegisterConfig,
    *,
    ingested: Mapping[str, Any],
    pictures: Sequence[bytes],
    records: Sequence[Path],
    page: Callable[[Decision], str] | None = None,
    signing_key: Path | None = None,
) -> Decision:
    """Puts the model before the gate and, when it passes, into the registry that `registry.connect` chose.

    Equal weights never make a second version: only the aliases move.

    Args:
        model_folder: what `pretrain` wrote.
        scores: what `evaluate` wrote.
        history: rows of the training, logged by step.
        params: the whole of params.yaml; all but `place` is logged and kept.
        config: the section `register`.
        ingested: what `ingest` counted.
        pictures: image files, at least two, on which the programs are checked.
        records: files kept in the version and with the run; those that are not there are left out.
        page: report.html of a decision, kept in the version; the version has no number yet then.
        signing_key: PEM file of a private key; the version is signed with it.

    Returns:
        {"version": text or None, "alias": [...], "new": bool, "rules": {name: {"passed", "reason"}}}
    """
    records = [path for path in records if path.is_file()]
    made_of = _read(model_folder, scores, params, records)
    candidate = gate.Candidate(
        folder=model_folder,
        provenance=made_of.lineage,
        scores=scores,
        commit=made_of.lineage["git_commit"],
        uncommitted=made_of.lineage["uncommitted"],
        records=[path.name for path in records],
        source=params["source"]["uri"],
        ingested=ingested,
        before=_data_of_newest(config.model),
    )
    rules = gate.to_register(candidate, config)
    if not all(rule.passed for rule in rules):
        return _decision(rules)
    weights = made_of.lineage["weights_sha256"]
    to_be_champion = gate.to_be_champion(scores, config, champion(config.model), weights)
    version = _existing(config.model, weights)
    if version is not None:
        return _decide(config, [*rules, to_be_champion], version, new=False)
    with tempfile.TemporaryDirectory() as temporary:
        inside, folder = Path(temporary, "version"), Path(temporary, "model")
        differences = package.contents(made_of, pictures, config, inside)
        if page is not None:
            told = gate.programs_agree(differences, len(pictures), config)
            number = f"of run {made_of.lineage['fingerprint']}"
            decision = _decision([*rules, told, to_be_champion], number, new=True)
            files.write(inside / "records" / "report.html", page(decision))
        package.assemble(inside, made_of, folder)
        shutil.rmtree(inside)
        differences.append(package.compare_whole(folder, made_of, pictures))
        rules.append(gate.programs_agree(differences, len(pictures), config))
        if not rules[-1].passed:
            return _decision(rules)
        seal_sha256 = seal.write(folder)
        if signing_key is not None:
            seal.sign(folder, signing_key)
        version = _publish(folder, made_of, history, config, seal_sha256, signed=signing_key is not None)
    return _decide(config, [*rules, to_be_champion], version, new=True)


def _data_of_newest(name: str) -> gate.Before | None:
    """Of the version that passed the gate last."""
    newest = find(name, alias="candidate")
    if newest is None or "seal_sha256" not in newest.tags:  # of before there were records
        return None
    version = str(newest.version)
    params = yaml.safe_load(record_of(name, version, "params.yaml"))
    ingested = json.loads(record_of(name, version, "ingest.json"))
    return gate.Before(version=version, source=params["source"]["uri"], ingested=ingested)


def _read(
    model_folder: Path, scores: Mapping[str, Any], params: Mapping[str, Any], records: Sequence[Path]
) -> package.Model:
    provenance = json.loads((model_folder / "config.json").read_text())["provenance"]
    commit = lineage.git_commit()
    digests = {f"{path.name}_sha256": files.sha256(path) for path in records if path.name in gate.RECORDS}
    return package.Model.read(
        model_folder,
        scores=scores,
        lineage={
            **provenance,
            "git_commit": commit["commit"],
            "uncommitted": commit["dirty"],
            "weights_sha256": weights_digest(model_folder),
            "model_sha256": model.digest(model_folder),
            **digests,
        },
        params=params,
        records=records,
    )


def _decision(rules: Sequence[gate.Rule], version: str | None = None, *, new: bool = False) -> Decision:
    champions = version is not None and rules[-1].passed
    return {
        "version": version,
        "alias": [] if version is None else ["candidate", "champion"] if champions else ["candidate"],
        "new": new,
        "rules": {rule.name: {"passed": rule.passed, "reason": rule.reason} for rule in rules},
    }


def _decide(config: RegisterConfig, rules: Sequence[gate.Rule], version: str, *, new: bool) -> Decision:
    """Moves the aliases as the last rule says."""
    decision = _decision(rules, version, new=new)
    for alias in decision["alias"]:
        aliases.move(config.model, alias, version, action="register", reason=rules[-1].reason)
    return decision


def weights_digest(model_folder: Path) -> str:
    """Names the weights of a model folder; the tag `weights_sha256` of a version."""
    parts = [files.sha256(model_folder / f"{name}.safetensors") for name in ("backbone", "objective")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _existing(name: str, weights: str) -> str | None:
    import mlflow

    versions = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    sealed = (one for one in versions if "seal_sha256" in one.tags)
    return next((str(one.version) for one in sealed if one.tags.get("weights_sha256") == weights), None)


def _publish(
    folder: Path,
    made_of: package.Model,
    history: Sequence[Mapping[str, float]],
    config: RegisterConfig,
    seal_sha256: str,
    *,
    signed: bool,
) -> str:
    """Sends a finished folder to the store and makes a version of it."""
    import mlflow

    origin = made_of.lineage
    tags = {
        "seal_sha256": seal_sha256,
        "signed": "yes" if signed else "no",
        "weights_sha256": origin["weights_sha256"],
        "model_sha256": origin["model_sha256"],
        "git_commit": origin["git_commit"],
        "git_dirty": ", ".join(origin["uncommitted"]) or "no",
        "training_data": origin["training_data"],
        "fingerprint": origin["fingerprint"],
        "seed": str(origin["seed"]),
        **{name.replace(".", "_"): origin[f"{name}_sha256"] for name in gate.RECORDS},
    }
    inside = folder / INSIDE
    client = mlflow.MlflowClient()
    record = tracking.begin(client, origin["fingerprint"], made_of.spec.objective["name"])  # pretraining has begun it
    with mlflow.start_run(run_id=record):
        mlflow.set_tags({**tags, "mlflow.source.git.commit": tags["git_commit"]})
        mlflow.log_params(_flatten({name: part for name, part in made_of.params.items() if name != "place"}))
        mlflow.log_metrics(_numbers(made_of.scores))
        tracking.send(client, record, history)  # what MLflow missed then
        mlflow.log_artifact(str(inside / "MODEL_CARD.md"))
        mlflow.log_artifacts(str(inside / "records"))
        logged = mlflow.initialize_logged_model(name="embedder", source_run_id=record)
        client.log_model_artifacts(logged.model_id, str(folder))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        version = mlflow.register_model(f"models:/{logged.model_id}", config.model, tags=tags)
        description = (inside / "MODEL_CARD.md").read_text()
        client.update_model_version(config.model, version.version, description=description)
    return str(version.version)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Every mean, under a name that MLflow allows."""
    found: dict[str, float] = {}
    for evaluation, table in scores.items():
        for protocol, row in table.items() if isinstance(table, Mapping) else ():
            for subject, value in row.items():
                if subject not in ("advantage", "skipped"):
                    name = re.sub(r"[^\w./: -]", " ", f"{evaluation}/{protocol}/{subject}")
                    found[name] = value["mean"]
    return found
