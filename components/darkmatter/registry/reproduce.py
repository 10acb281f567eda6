"""Is a version what it says it was made of? Trains it again from its commit, alone, and compares the weights bit for bit.

<folder>/version      the verified copy of the version: its records say what it was made of
         repository   a fresh clone at its commit, with checkpoints and an MLflow of its own
         dvc-cache    likewise
         start        the version that its training started from, if it did

Nothing of the user's is written to, and nothing trained before is used: not the DVC cache, not the checkpoints.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from darkmatter import files, lineage, registry, remote, shards, sources
from darkmatter.console import Stopped
from darkmatter.params import ParamsError
from darkmatter.registry.register import weights_digest

#: What would lead a stage to the user's cluster, registry or repository.
_LEADING_AWAY = ("DARKMATTER_", "DVC_", "GIT_", "MLFLOW_", "RAY_ADDRESS", "RAY_JOB_", "SERVING_")
_SCRATCH = {
    "storage": "checkpoints", "data": "", "cache": ".cache/shards", "features": ".cache/features",
    "mlflow": "sqlite:///mlflow.db", "dvc": "", "signing_key": "",
}  # fmt: skip
_MODEL = Path("models/backbone")


class NotReproduced(Stopped):
    """A version could not be made again, or what was made is another one; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a version says of itself."""

    inside: Path
    """artifacts/version of its verified copy."""
    lineage: Mapping[str, Any]
    params: Mapping[str, Any]
    """Of its training; without `place`."""
    lock: Mapping[str, Any]
    """The stages of its dvc.lock."""

    @classmethod
    def read(cls, version: Path) -> "Origin":
        inside = version / registry.INSIDE
        records = inside / "records"
        return cls(
            inside=inside,
            lineage=json.loads((records / "lineage.json").read_text()),
            params=yaml.safe_load((records / "params.yaml").read_text()),
            lock=_stages(records / "dvc.lock"),
        )

    @property
    def seconds(self) -> float | None:
        """How long its training took."""
        path = self.inside / "records" / "pretrain.json"
        return json.loads(path.read_text()).get("wall_seconds") if path.is_file() else None


def reproduce(name: str, version: str, place: Mapping[str, Any], *, folder: Path) -> str:
    """Rebuilds a version as far as its weights.

    Args:
        name: of the registered model; `registry.connect` chose the registry.
        version: its number.
        place: the section `place` of the user's params.yaml: of how many processes and cores this machine has, no more.
        folder: a new one; what is made lies there.

    Raises:
        NotReproduced: its origin cannot be had, or is not what the version was made of, or the weights are others.
        ValueError: there is no such version, or this is no repository.
        seal.Broken: the version is not what was registered.

    Returns:
        What was proven, for people.
    """
    registry.fetch(f"models:/{name}/{version}", folder / "version")
    origin = Origin.read(folder / "version")
    top = _require_commit(origin)
    for warning in doubts(origin, place):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    project = _clone(origin, top, place, folder, start=_fetch_start(name, origin, folder))
    print(_announce(f"{name} version {version}", origin, project), flush=True)
    began = time.monotonic()
    _run(project, "-m", "dvc", "repro", "augment")
    stage = ["pretrain"]
    if problem := other_data(origin, project):
        if not take_data(origin, project, Path("data/train")):
            raise NotReproduced(f"{name} version {version} was not reproduced, and nothing was trained. {problem}")
        print(
            f"warning: {problem}. data/train of this folder is what it was trained on: a copy of that is used",
            flush=True,
        )
        stage = ["--single-item", "pretrain"]
    _run(project, "-m", "dvc", "repro", *stage)
    found = list(differences(origin, project))
    if found:
        lines = "\n".join(f"- {one}" for one in found)
        raise NotReproduced(f"{name} version {version} was not reproduced:\n{lines}")
    took = _duration(time.monotonic() - began)
    return f"{name} version {version} is reproduced, bit for bit: weights {origin.lineage['weights_sha256']}, in {took}"


def doubts(origin: Origin, place: Mapping[str, Any]) -> Iterator[str]:
    """What is known beforehand to lead to other weights, or may: libraries, processor, number of workers, a GPU."""
    here = lineage.versions()
    for library, then in origin.lineage["versions"].items():
        if library in here and here[library] != then:
            yield f"trained with {library} {then}, here is {here[library]}; records/requirements.lock has its libraries"
    then = origin.lineage.get("computed")
    if then is None:
        yield (
            f"the version does not say by how many workers it was trained; {place['workers']} of "
            f"{place['cpus_per_worker']} CPUs (place) are used here, and another number adds up in another order"
        )
        return
    now = torch.backends.cpu.get_cpu_capability()
    if then["processor"] != now:
        yield f"trained with the instructions {then['processor']} of a processor, here are {now}; they round differently"
    if then["gpu"]:
        yield "trained on GPUs, whose sums are not promised to be equal twice"
    if len(then["workers"]) > 1:
        yield f"trained by {' and '.join(map(str, then['workers']))} workers in turn; when they changed is not repeated"


def other_data(origin: Origin, project: Path) -> str:
    """How the training data that were made again differ; empty when they do not."""
    then, now = origin.lineage["training_data"], shards.Manifest.load(project / "data" / "train")
    if now.digest == then:
        return ""
    known = origin.lineage["training_samples"]
    return (
        f"The training data are others: {then[:12]} with {known} samples then, {now.digest[:12]} with "
        f"{now.samples('train')} now. {origin.params['source']['uri']} has changed since, was ingested in several steps "
        "then, or other libraries decode it"
    )


def take_data(origin: Origin, project: Path, ours: Path) -> bool:
    """Copies a training set into the clone, if it is the one that the version was trained on."""
    if not (ours / "manifest.json").is_file() or shards.Manifest.load(ours).digest != origin.lineage["training_data"]:
        return False
    shutil.rmtree(project / "data" / "train")
    shutil.copytree(ours, project / "data" / "train")
    return True


def differences(origin: Origin, project: Path) -> Iterator[str]:
    """Which parts of the rebuilt model are not those of the version; nothing when the weights are equal.

    Args:
        origin: of the version.
        project: the folder of params.yaml in the clone, after its `dvc repro pretrain`.
    """
    if weights_digest(project / _MODEL) == origin.lineage["weights_sha256"]:
        return
    then, now = origin.lock["pretrain"], _stages(project / "dvc.lock")["pretrain"]
    code = [path for path, digest in _code(then).items() if _code(now).get(path, digest) != digest]
    if code:
        yield f"code: not that of the commit when it was trained: {', '.join(sorted(code))}"
    chosen, given = (one.get("params", {}).get("params.yaml", {}) for one in (then, now))
    if params := sorted(key for key in chosen.keys() | given.keys() if chosen.get(key) != given.get(key)):
        yield f"params: not those that it was trained with: {', '.join(params)}"
    fingerprint = json.loads((project / _MODEL / "config.json").read_text())["provenance"]["fingerprint"]
    same = fingerprint == origin.lineage["fingerprint"]
    if not same:
        yield f"run: {origin.lineage['fingerprint']} then, {fingerprint} now: other code, params or data"
    for file in ("backbone.safetensors", "objective.safetensors"):
        yield from _other_tensors(file, origin.inside / "model" / file, project / _MODEL / file)
    if same:
        yield f"code, params and data are equal: it is something warned of, or the weights are not of {_of(origin)}"
    elif not (code or params):
        yield "dvc.lock has the files of the commit: what Python ran then was darkmatter from elsewhere, or another Python"


def _other_tensors(name: str, then: Path, now: Path) -> Iterator[str]:
    before, after = load_file(then), load_file(now)
    if before.keys() != after.keys():
        yield f"weights: {name} holds others: {', '.join(sorted(before.keys() ^ after.keys()))}"
        return
    unlike = [key for key in before if not torch.equal(before[key], after[key])]
    if not unlike:
        return
    apart = {key: _apart(before[key], after[key]) for key in unlike if before[key].is_floating_point()}
    worst = max(apart, key=lambda key: apart[key], default="none of numbers")
    yield (
        f"weights: {len(unlike)} of {len(before)} tensors in {name} differ, most {worst}, by "
        f"{apart.get(worst, 0.0):.1e} of its largest number"
    )


def _apart(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    before, after = before.double(), after.double()
    return float((before - after).abs().max() / torch.maximum(before.abs().max(), after.abs().max()))


def _require_commit(origin: Origin) -> Path:
    """The top of this repository, which has the commit.

    Raises:
        NotReproduced: the version was made of more than a commit, or the commit is not here.
        ValueError: this is no repository.
    """
    commit = origin.lineage["git_commit"]
    # Its params are kept in the version. What other files held then is not.
    if unknown := [path for path in origin.lineage["uncommitted"] if Path(path).name != "params.yaml"]:
        raise NotReproduced(
            f"this version cannot be reproduced: it was made with files that were not those of commit {commit[:12]} "
            f"(register.allow_dirty), and nobody kept what they held: {', '.join(unknown)}"
        )
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False)
    if top.returncode:
        raise ValueError("this folder is in no Git repository; run it from a clone of the one that the version is of")
    known = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False)
    if known.returncode:
        raise NotReproduced(
            f"commit {commit} is not in this repository; fetch it (git fetch origin {commit}), or run this from a clone "
            "that has it"
        )
    return Path(top.stdout.strip())


def _fetch_start(name: str, origin: Origin, folder: Path) -> Path | None:
    """The model folder of the version that the training started from; None for one from fresh weights."""
    digest = origin.lineage.get("started_from")
    if not digest:
        return None
    import mlflow

    versions = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    found = next((one for one in versions if one.tags.get("model_sha256") == digest), None)
    if found is None:
        raise NotReproduced(f"it was trained on from model {digest[:12]}, which no version of {name} is")
    registry.fetch(f"models:/{name}/{found.version}", folder / "start")
    return folder / "start" / registry.INSIDE / "model"


def _clone(origin: Origin, top: Path, place: Mapping[str, Any], folder: Path, *, start: Path | None) -> Path:
    """The project in a fresh clone, as it was when the version was made; nothing in it leads out of `folder`."""
    here, clone = Path.cwd(), folder / "repository"
    # Of a folder Git copies all objects, so that a commit is found that no branch has any more.
    _git("clone", "--quiet", "--no-checkout", str(top), str(clone))
    _git("-C", str(clone), "checkout", "--quiet", "--detach", origin.lineage["git_commit"])
    project = clone / here.resolve().relative_to(top.resolve())
    if not (project / "params.yaml").is_file():
        raise NotReproduced(f"commit {origin.lineage['git_commit']} has no params.yaml in {project.relative_to(clone)}")
    there = yaml.safe_load((project / "params.yaml").read_text())["place"]  # with the keys of that commit
    computed = origin.lineage.get("computed", {})
    as_then = {key: value for key, value in computed.items() if key != "workers"}
    if computed:
        least, most = min(computed["workers"]), max(computed["workers"])
        as_then["workers"] = least if least == most else [least, most]
    wanted = {**place, **as_then, **_SCRATCH}
    tree = dict(origin.params)
    tree["source"] = {**tree["source"], "uri": _from_anywhere(tree["source"]["uri"], here)}
    if start is not None:
        tree["pretrain"] = {**tree["pretrain"], "warm_start": str(start.resolve())}
    tree["place"] = {key: wanted.get(key, value) for key, value in there.items()}
    files.write(project / "params.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    # A cache that the user's own or the machine's settings of DVC name has the trained weights in it.
    files.write(project / ".dvc" / "config.local", f"[cache]\n    dir = {(folder / 'dvc-cache').resolve()}\n")
    found = Path(_run(project, "-c", "import darkmatter; print(darkmatter.__file__)", quiet=True).strip())
    if not found.resolve().is_relative_to(project.resolve()):
        raise NotReproduced(
            f"Python finds darkmatter in {found.parent}, not in the clone; it must be importable by PYTHONPATH"
        )
    return project


def _from_anywhere(uri: str, here: Path) -> str:
    """A source that is named by a path relative to this folder, by its absolute one."""
    scheme, _, location = uri.partition(":")
    if remote.is_remote(location) or Path(location).is_absolute():
        return uri
    absolute = f"{scheme}:{here / location}"
    try:
        sources.open_source(sources.SourceConfig(uri=absolute, labels=False))
    except ParamsError:  # it names no path, or one that is not there, of which the stage will say so
        return uri
    return absolute


def _run(project: Path, *arguments: str, quiet: bool = False) -> str:
    """Python in the clone, on the clone's code. What it prints is shown while it runs, unless `quiet`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LEADING_AWAY)}
    paths = [str(project.resolve() / "components"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # DVC runs `python`
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env=environment,
        text=True,
        check=False,
        stdout=subprocess.PIPE if quiet else None,
    )
    if done.returncode:
        raise NotReproduced(f"it could not be rebuilt: `{' '.join(arguments)}` in {project} failed, see above")
    return done.stdout or ""


def _git(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise NotReproduced(f"git {' '.join(arguments)}: {done.stderr.strip()}")


def _announce(what: str, origin: Origin, project: Path) -> str:
    known = origin.lineage
    tree = yaml.safe_load((project / "params.yaml").read_text())["place"]
    lasting = "" if origin.seconds is None else f" ({_duration(origin.seconds)} then)"
    return (
        f"rebuilding {what} in {project}\n"
        f"  from commit {known['git_commit']}, run {known['fingerprint']}, seed {known['seed']}\n"
        f"  source {origin.params['source']['uri']}, training data {known['training_data'][:12]} of "
        f"{known['training_samples']} samples\n"
        f"  by {tree['workers']} worker(s) of {tree['cpus_per_worker']} CPUs on this machine\n"
        f"It trains all {known['steps']} steps from the first, which takes as long as the training did{lasting}."
    )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _of(origin: Origin) -> str:
    return f"seed {origin.lineage['seed']} and commit {origin.lineage['git_commit'][:12]}"


def _stages(lock: Path) -> Mapping[str, Any]:
    return yaml.safe_load(lock.read_text())["stages"]


def _code(stage: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files that a stage ran."""
    deps: Sequence[Mapping[str, str]] = stage["deps"]
    return {dep["path"]: dep["md5"] for dep in deps if not dep["path"].startswith("data/")}
