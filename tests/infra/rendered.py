"""The files of infra/ as their tools see them. `python tests/infra/rendered.py FOLDER` writes them for checkov."""

import copy
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
OVERLAYS = ("small", "gpu-nightly", "gpu-kueue")

Tree = dict[str, Any]


def tool(name: str) -> str:
    """Path of a program of `make tools`, or of this machine."""
    found = shutil.which(name, path=f"{ROOT / '.tools/bin'}{os.pathsep}{os.environ['PATH']}")
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not here; `make tools` installs it")
    if found is None:
        pytest.skip(f"{name} is not here; `make tools` installs it")
    return found


def run(*command: str, **more: Any) -> subprocess.CompletedProcess:
    return subprocess.run([tool(command[0]), *command[1:]], capture_output=True, text=True, **more)


def kustomize(folder: Path) -> list[Tree]:
    done = run("kubectl", "kustomize", str(folder))
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def _manifests(overlay: str) -> list[Tree]:
    return kustomize(INFRA / "kubernetes" / ("overlays" if overlay in OVERLAYS else "samples") / overlay)


def manifests(overlay: str) -> list[Tree]:
    """Of an overlay or a sample."""
    return copy.deepcopy(_manifests(overlay))


def one(trees: list[Tree], kind: str, name: str) -> Tree:
    return next(tree for tree in trees if (tree["kind"], tree["metadata"]["name"]) == (kind, name))


@functools.cache
def _rayjob(overlay: str) -> Tree:
    with tempfile.TemporaryDirectory() as scratch:
        write_config_map(one(_manifests(overlay), "ConfigMap", "darkmatter-run"), Path(scratch))
        return one(kustomize(Path(scratch)), "RayJob", "darkmatter-run")


def rayjob(overlay: str) -> Tree:
    """What the CronJob's pod makes of the overlay's ConfigMap."""
    return copy.deepcopy(_rayjob(overlay))


def write_config_map(tree: Tree, folder: Path) -> None:
    """As the kubelet lays it out: files are links to a folder that is a link."""
    (folder / "..1").mkdir()
    (folder / "..data").symlink_to("..1")
    for name, content in tree["data"].items():
        (folder / "..1" / name).write_text(content)
        (folder / name).symlink_to(f"..data/{name}")


def pod_templates(overlay: str) -> Iterator[tuple[str, Tree]]:
    """Every pod that an overlay may start, by a name."""
    for tree in manifests(overlay):
        where = f"{tree['kind']}/{tree['metadata']['name']}"
        if tree["kind"] in ("Deployment", "StatefulSet"):
            yield where, tree["spec"]["template"]
        if tree["kind"] == "CronJob":
            yield where, tree["spec"]["jobTemplate"]["spec"]["template"]
    yield from pods_of_rayjob(rayjob(overlay)["spec"])


def pods_of_rayjob(spec: Tree) -> Iterator[tuple[str, Tree]]:
    yield "RayJob/submitter", spec["submitterPodTemplate"]
    cluster = spec["rayClusterSpec"]
    head = copy.deepcopy(cluster["headGroupSpec"]["template"])
    if cluster[
        "enableInTreeAutoscaling"
    ]:  # KubeRay adds this container with the head's image and what autoscalerOptions say
        options = {k: v for k, v in cluster["autoscalerOptions"].items() if k not in ("version", "idleTimeoutSeconds")}
        image = head["spec"]["containers"][0]["image"]
        head["spec"]["containers"].append({"name": "autoscaler", "image": image, **options})
    yield "RayJob/head", head
    for group in cluster["workerGroupSpecs"]:
        yield f"RayJob/{group['groupName']}", group["template"]


def as_pod(name: str, template: Tree) -> Tree:
    metadata = {**template["metadata"], "name": name.rpartition("/")[2], "namespace": "darkmatter"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def as_job(name: str, template: Tree) -> Tree:
    """What runs to its end; KubeRay adds the probes of a Ray container."""
    pod = as_pod(name, template)
    inside = {"metadata": {"labels": pod["metadata"]["labels"]}, "spec": pod["spec"]}
    metadata = {"name": pod["metadata"]["name"], "namespace": "darkmatter"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": inside}}


def write_for_checkov(folder: Path) -> None:
    """Rendered manifests; the pods of runs as jobs, since checkov knows nothing of RayJobs; Dockerfile and compose file."""
    for overlay in OVERLAYS:
        runs = [as_job(name, template) for name, template in pods_of_rayjob(rayjob(overlay)["spec"])]
        (folder / f"{overlay}.yaml").write_text(yaml.safe_dump_all([*manifests(overlay), *runs]))
    (folder / "Dockerfile").write_text((INFRA / "docker" / "Dockerfile").read_text())
    workflows = folder / ".github" / "workflows"
    workflows.mkdir(parents=True)
    (workflows / "nightly.yaml").write_text((INFRA / "schedule" / "github-actions.yaml").read_text())


if __name__ == "__main__":
    write_for_checkov(Path(sys.argv[1]))
