"""infra/kubernetes as kubectl renders it, against schemas and against what we promise of it."""

import copy
import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kuberay
import networks
import pytest
import yaml
from rendered import (
    INFRA,
    OVERLAYS,
    as_pod,
    manifests,
    one,
    pod_templates,
    pods_of_rayjob,
    rayjob,
    run,
    tool,
    write_config_map,
)

VERSION = "1.37"


def schema_errors(trees: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(trees))
    done = run("kubernetes-validate", "--strict", "--quiet", "-k", VERSION, str(path))
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_one_of_kubernetes(overlay: str, tmp_path: Path) -> None:
    """Strictly: no field that it does not know. The pods of a run are checked as pods, less what KubeRay adds."""
    runs = [as_pod(name, template) for name, template in pods_of_rayjob(rayjob(overlay)["spec"])]
    assert schema_errors([*manifests(overlay), *runs], tmp_path) == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda trees: one(trees, "CronJob", "darkmatter-nightly")["spec"].update(concurencyPolicy="Forbid"),
        lambda trees: one(trees, "Deployment", "mlflow")["spec"].update(replicas="one"),
        lambda trees: one(trees, "NetworkPolicy", "ray")["spec"]["ingress"][0].update(form=[]),
        lambda trees: one(trees, "Service", "mlflow")["spec"]["ports"][0].pop("port"),
    ],
)
def test_a_wrong_field_is_seen(spoil: Callable[[Any], Any], tmp_path: Path) -> None:
    trees = manifests("small")
    spoil(trees)
    assert schema_errors(trees, tmp_path) != ""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_and_kueue_accept_the_run(overlay: str) -> None:
    assert kuberay.refused(rayjob(overlay)) == []


def spoiled(overlay: str, path: str, value: Any) -> dict[str, Any]:
    tree = rayjob(overlay)
    *steps, last = path.split("/")
    here: Any = tree
    for step in steps:
        here = here[int(step) if step.isdigit() else step]
    here[last] = value
    return tree


@pytest.mark.parametrize(
    ("overlay", "path", "value", "message"),
    [
        ("small", "spec/concurrencyPolicy", "Forbid", "no such field"),
        ("small", "spec/backoffLimit", "3", "is no int"),
        ("small", "spec/shutdownAfterJobFinishes", True, "exclude each other"),
        ("small", "spec/ttlSecondsAfterFinished", 60, "needs shutdownAfterJobFinishes"),
        ("small", "spec/deletionStrategy/deletionRules/0/policy", "DeleteWorkers", "not supported with the autoscaler"),
        ("small", "spec/deletionStrategy/deletionRules/0/condition/ttlSeconds", 10**7, "before the cluster"),
        ("small", "spec/deletionStrategy/deletionRules/1/policy", "DeleteCluster", "twice"),
        ("small", "spec/deletionStrategy/deletionRules/0/condition/jobDeploymentStatus", "Failed", "exactly one"),
        ("small", "spec/rayClusterSpec/rayVersion", "2.51.0", "2.52 or newer"),
        ("small", "spec/rayClusterSpec/headGroupSpec/template/spec/restartPolicy", "Always", "restartPolicy Never"),
        ("small", "spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", 9, "out of their range"),
        ("gpu-kueue", "spec/rayClusterSpec/enableInTreeAutoscaling", True, "Kueue: no autoscaling"),
        ("gpu-kueue", "spec/suspend", False, "Kueue: starts suspended"),
        ("small", "metadata/name", "n" * 48, "47"),
    ],
)
def test_what_kuberay_refuses_is_seen(overlay: str, path: str, value: Any, message: str) -> None:
    assert any(message in reason for reason in kuberay.refused(spoiled(overlay, path, value)))


def test_the_sample_of_kuberays_own_cron_runs_what_the_cronjob_runs() -> None:
    trees = manifests("raycronjob")
    assert [tree["kind"] for tree in trees] == ["RayCronJob"]
    spec = trees[0]["spec"]
    assert kuberay.unknown(spec, kuberay.RAYCRONJOB, "spec") == []
    assert kuberay.refused({"metadata": {"name": "n"}, "spec": spec["jobTemplate"]}) == []
    nightly = one(manifests("small"), "CronJob", "darkmatter-nightly")["spec"]
    assert (spec["schedule"], spec["timeZone"]) == (nightly["schedule"], nightly["timeZone"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_read_only(overlay: str) -> None:
    """Kubernetes' restricted profile, and more: a root that cannot be written, no account's token, images by digest."""
    for where, template in pod_templates(overlay):
        spec = template["spec"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}, where
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 10000, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert spec["automountServiceAccountToken"] is (where == "CronJob/darkmatter-nightly"), where
        assert spec["enableServiceLinks"] is False, where
        for volume in spec.get("volumes", []):
            kind = next(key for key in volume if key != "name")
            assert kind in ("emptyDir", "secret", "configMap", "projected"), (where, volume)
            assert kind != "emptyDir" or "sizeLimit" in volume["emptyDir"], (where, volume)
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            inside = container["securityContext"]
            assert inside["allowPrivilegeEscalation"] is False and inside["readOnlyRootFilesystem"] is True, where
            assert inside["capabilities"] == {"drop": ["ALL"]} and "privileged" not in inside, where
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), (where, container["image"])
            assert container["resources"].keys() == {"requests", "limits"}, where
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_autoscaler_sees_its_token(overlay: str) -> None:
    """What a job runs, on the head or on workers, has no token of Kubernetes."""
    for where, template in pod_templates(overlay):
        with_token = {volume["name"] for volume in template["spec"].get("volumes", []) if "projected" in volume}
        for container in template["spec"]["containers"]:
            mounted = with_token & {mount["name"] for mount in container["volumeMounts"]}
            assert bool(mounted) == (container["name"] == "autoscaler"), (where, container["name"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_and_never_written(overlay: str) -> None:
    assert not [tree for tree in manifests(overlay) if tree["kind"] == "Secret"]
    for where, template in pod_templates(overlay):
        for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|TOKEN|KEY_ID|STORE_URI", variable["name"]) and "value" in variable:
                    assert variable["value"].startswith("/secrets/"), (where, variable)


def test_who_makes_runs_may_do_nothing_else() -> None:
    trees = manifests("small")
    assert one(trees, "Role", "darkmatter-nightly")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    assert not [tree for tree in trees if tree["kind"].startswith("Cluster")]
    assert one(trees, "CronJob", "darkmatter-nightly")["spec"]["concurrencyPolicy"] == "Forbid"
    levels = one(trees, "Namespace", "darkmatter")["metadata"]["labels"]
    assert levels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.fixture(scope="module")
def policies() -> list[dict[str, Any]]:
    return [tree for tree in manifests("gpu-nightly") if tree["kind"] == "NetworkPolicy"]


def pod(name: str) -> dict[str, Any]:
    found = {where.rpartition("/")[2]: template for where, template in pod_templates("gpu-nightly")}
    return {"labels": found[name]["metadata"]["labels"]}


OTHERS = {
    "dns": {"namespace": {"kubernetes.io/metadata.name": "kube-system"}, "labels": {"k8s-app": "kube-dns"}},
    "operator": {"namespace": {"kubernetes.io/metadata.name": "kuberay-system"}, "labels": {}},
    "prometheus": {"namespace": {"kubernetes.io/metadata.name": "monitoring"}, "labels": {}},
    "consumer": {"namespace": {"darkmatter/consumes": "true"}, "labels": {}},
    "stranger": {"namespace": {"kubernetes.io/metadata.name": "default"}, "labels": {}},
    "intruder": {"labels": {"app": "intruder"}},
    "github": {"address": "140.82.121.4"},
    "metadata service": {"address": "169.254.169.254"},
    "kubernetes": {"address": "10.96.0.1"},
}


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("head", "gpu", 10002, True), ("gpu", "head", 6379, True), ("gpu", "cpu", 31234, True),
        ("submitter", "head", 8265, True), ("submitter", "head", 6379, False), ("submitter", "mlflow", 5000, False),
        ("operator", "head", 8265, True), ("operator", "head", 6379, False), ("operator", "mlflow", 5000, False),
        ("prometheus", "gpu", 8080, True), ("prometheus", "head", 8265, False), ("prometheus", "mlflow", 5000, False),
        ("gpu", "mlflow", 5000, True), ("gpu", "postgres", 5432, False), ("mlflow", "postgres", 5432, True),
        ("consumer", "mlflow", 5000, True), ("consumer", "head", 8265, False), ("consumer", "postgres", 5432, False),
        ("stranger", "head", 8265, False), ("stranger", "gpu", 8080, False), ("stranger", "mlflow", 5000, False),
        ("intruder", "head", 8265, False), ("intruder", "postgres", 5432, False), ("intruder", "github", 443, False),
        ("intruder", "kubernetes", 443, False), ("intruder", "dns", 53, False),  # TCP is; see below
        ("gpu", "github", 443, True), ("gpu", "github", 22, False), ("gpu", "metadata service", 80, False),
        ("gpu", "metadata service", 443, False), ("gpu", "kubernetes", 443, False), ("head", "kubernetes", 443, True),
        ("darkmatter-nightly", "kubernetes", 6443, True), ("darkmatter-nightly", "github", 443, False),
        ("darkmatter-nightly", "head", 8265, False), ("mlflow", "head", 8265, False), ("mlflow", "kubernetes", 443, False),
        ("postgres", "github", 443, False), ("mlflow", "github", 443, True), ("head", "postgres", 5432, False),
    ],
)  # fmt: skip
def test_who_reaches_whom(policies: Any, source: str, target: str, port: int, allowed: bool) -> None:
    if (source, target) == ("intruder", "dns"):
        assert networks.reaches(policies, OTHERS[source], OTHERS[target], 53, "UDP")
        allowed = True
    found = networks.reaches(policies, OTHERS.get(source) or pod(source), OTHERS.get(target) or pod(target), port)
    assert found is allowed


def test_without_the_policy_that_denies_an_intruder_gets_out(policies: Any) -> None:
    """That the matrix above can fail, and that it fails for the reason that it should."""
    others = [policy for policy in policies if policy["metadata"]["name"] not in ("deny-all", "names")]
    assert networks.reaches(others, OTHERS["intruder"], OTHERS["github"], 443)


def test_gpus_are_only_where_they_are_meant() -> None:
    groups = {
        group["groupName"]: group for group in rayjob("gpu-nightly")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    assert groups["gpu"]["minReplicas"] == 0 == groups["gpu"]["replicas"] and groups["gpu"]["maxReplicas"] == 8
    limits = {name: g["template"]["spec"]["containers"][0]["resources"]["limits"] for name, g in groups.items()}
    assert "nvidia.com/gpu" not in limits["cpu"] and limits["gpu"]["nvidia.com/gpu"] == "1"
    place = yaml.safe_load((INFRA / "places" / "gpu.yaml").read_text())
    assert place["cpus_per_worker"] == int(limits["gpu"]["cpu"]) and place["workers"] == groups["gpu"]["maxReplicas"]


class Kubernetes:
    """An API server that knows RayJobs only: what create-run.sh asks of one, over HTTP."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, Any]] = {}
        self.statuses: list[dict[str, str]] = [{}, {"jobDeploymentStatus": "Running"}]
        self.created = 0
        kubernetes = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kubernetes.answer(self, self.path.partition("?")[0])

            def do_POST(self) -> None:
                tree = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = tree["metadata"]["name"]
                if name in kubernetes.made:
                    return kubernetes.say(self, status("AlreadyExists", 409), 409)
                kubernetes.created += 1
                kubernetes.made[name] = tree
                kubernetes.say(self, tree, 201)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def say(self, to: http.server.BaseHTTPRequestHandler, tree: Any, code: int = 200) -> None:
        content = json.dumps(tree).encode()
        to.send_response(code)
        to.send_header("Content-Type", "application/json")
        to.send_header("Content-Length", str(len(content)))
        to.end_headers()
        to.wfile.write(content)

    def answer(self, to: http.server.BaseHTTPRequestHandler, path: str) -> None:
        version = {"groupVersion": "ray.io/v1", "version": "v1"}
        kind = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
        checked = {"x-kubernetes-group-version-kind": kind, "parameters": [{"name": "fieldValidation", "in": "query"}]}
        resource = {
            "name": "rayjobs",
            "singularName": "rayjob",
            "namespaced": True,
            "kind": "RayJob",
            "verbs": ["create", "get"],
        }
        known = {
            "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {
                "kind": "APIGroupList",
                "groups": [{"name": "ray.io", "versions": [version], "preferredVersion": version}],
            },
            "/apis/ray.io/v1": {"kind": "APIResourceList", "groupVersion": "ray.io/v1", "resources": [resource]},
            "/openapi/v3": {"paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}},
            "/openapi/v3/apis/ray.io/v1": {
                "openapi": "3.0.0", "info": {"title": "", "version": ""}, "components": {},
                "paths": {"/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}": {"patch": {**checked, "responses": {}}}},
            },
        }  # fmt: skip
        name = path.rpartition("/")[2]
        if path.startswith("/apis/ray.io/v1/namespaces/darkmatter/rayjobs/") and name in self.made:
            now = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            return self.say(to, {**self.made[name], "status": now})
        self.say(to, known.get(path, status("NotFound", 404)), 200 if path in known else 404)


def status(reason: str, code: int) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": reason,
        "code": code,
    }


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    made = Kubernetes()
    yield made
    made.server.shutdown()
    made.server.server_close()


def create_run(kubernetes: Kubernetes, tmp_path: Path, name: str) -> subprocess.CompletedProcess:
    folder = tmp_path / "run"
    if not folder.exists():
        folder.mkdir()
        write_config_map(one(manifests("gpu-nightly"), "ConfigMap", "darkmatter-run"), folder)
    port = kubernetes.server.server_address[1]
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "namespace": "darkmatter", "user": "u"}}],
    }  # fmt: skip
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    environment = {
        "PATH": f"{Path(tool('kubectl')).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path),
        "KUBECONFIG": str(tmp_path / "config"), "RUN_NAME": name, "RUN_FOLDER": str(folder), "LOOK_EVERY": "0.1",
    }  # fmt: skip
    return subprocess.run(["bash", str(folder / "create-run.sh")], env=environment, capture_output=True, text=True)


ENDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "message": "done"}


def test_a_night_makes_a_run_of_its_name_and_waits_for_its_end(kubernetes: Kubernetes, tmp_path: Path) -> None:
    kubernetes.statuses += [{"jobDeploymentStatus": "Retrying"}, ENDED]
    done = create_run(kubernetes, tmp_path, "darkmatter-nightly-29384940")
    assert done.returncode == 0, done.stderr
    made = copy.deepcopy(kubernetes.made["darkmatter-nightly-29384940"])
    assert made["metadata"].pop("name") == "darkmatter-nightly-29384940"
    expected = rayjob("gpu-nightly")
    assert made["spec"] == expected["spec"] and "SUCCEEDED. done" in done.stdout


def test_a_pod_that_is_started_again_waits_for_the_run_that_is_there(kubernetes: Kubernetes, tmp_path: Path) -> None:
    kubernetes.statuses += [ENDED]
    assert create_run(kubernetes, tmp_path, "night").returncode == 0
    kubernetes.statuses = [{"jobDeploymentStatus": "Running"}, ENDED]
    again = create_run(kubernetes, tmp_path, "night")
    assert again.returncode == 0, again.stderr
    assert kubernetes.created == 1


@pytest.mark.parametrize(
    "end",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "the gate refused it"},
        {"jobDeploymentStatus": "Failed", "message": "no cluster"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "by hand"},
    ],
)
def test_a_run_that_failed_fails_the_night_and_says_why(kubernetes: Kubernetes, tmp_path: Path, end: Any) -> None:
    kubernetes.statuses += [end]
    done = create_run(kubernetes, tmp_path, "night")
    assert done.returncode == 1 and end["message"] in done.stdout


def test_a_kubernetes_that_does_not_answer_is_asked_by_another_pod(kubernetes: Kubernetes, tmp_path: Path) -> None:
    kubernetes.server.shutdown()
    kubernetes.server.server_close()
    assert create_run(kubernetes, tmp_path, "night").returncode == 75
    policy = one(manifests("small"), "CronJob", "darkmatter-nightly")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]
    assert policy["rules"][0] == {
        "action": "FailJob", "onExitCodes": {"containerName": "create", "operator": "In", "values": [1]},
    }  # fmt: skip


def test_a_nights_name_is_short_enough_for_kuberay() -> None:
    name = one(manifests("small"), "CronJob", "darkmatter-nightly")["metadata"]["name"]
    assert kuberay.refused(spoiled("small", "metadata/name", f"{name}-29384940")) == []


def test_checkov_finds_nothing_that_has_no_reason(tmp_path: Path) -> None:
    from rendered import write_for_checkov

    write_for_checkov(tmp_path)
    config = INFRA / "checkov.yaml"
    done = run("checkov", "--directory", str(tmp_path), "--config-file", str(config), "--output", "json", env=quiet())
    reports = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    assert {report["check_type"] for report in reports} >= {"kubernetes", "dockerfile"}
    for report in reports:
        failed = [(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]]
        assert failed == [] and report["summary"]["passed"] > 10, failed
    assert done.returncode == 0


def test_checkov_would_find_something(tmp_path: Path) -> None:
    tree = one(manifests("small"), "Deployment", "mlflow")
    tree["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    policies = [tree for tree in manifests("small") if tree["kind"] == "NetworkPolicy"]
    (tmp_path / "mlflow.yaml").write_text(yaml.safe_dump_all([tree, *policies]))
    config = INFRA / "checkov.yaml"
    done = run("checkov", "--directory", str(tmp_path), "--config-file", str(config), "--output", "json", env=quiet())
    assert done.returncode == 1
    assert [c["check_id"] for c in json.loads(done.stdout)["results"]["failed_checks"]] == ["CKV_K8S_22"]


def quiet() -> dict[str, str]:
    return {**os.environ, "LOG_LEVEL": "ERROR", "CHECKOV_RUN_SCA_PACKAGE_SCAN_V2": "false"}


def test_every_check_of_checkov_that_is_left_out_has_its_reason_beside_it() -> None:
    lines = (INFRA / "checkov.yaml").read_text().splitlines()
    skipped = [line for line in lines if line.strip().startswith("- CKV")]
    assert skipped and all(re.search(r"- CKV\w+  # \w+ .{20,}", line) for line in skipped)
