"""What KubeRay accepts, as far as infra/ uses it: fields of ray.io/v1 and the rules of its validation.

Its CRDs are in no package. Fields: ray-operator/apis/ray/v1/{rayjob,raycluster,raycronjob}_types.go; rules:
ray-operator/controllers/ray/utils/validation.go of github.com/ray-project/kuberay (1.7). Kueue's rules:
pkg/controller/jobs/rayjob/rayjob_webhook.go and raycluster_webhook.go of github.com/kubernetes-sigs/kueue.
"""

import re
import shlex
from typing import Any

POD = "a pod template, which the schemas of Kubernetes know"
OPEN = "any mapping of strings"

_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": {"token", "disabled"}, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v1", "v2"}, "idleTimeoutSeconds": int, "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "image": str, "imagePullPolicy": {"Always", "IfNotPresent", "Never"}, "env": list, "envFrom": list,
        "resources": dict, "securityContext": dict, "volumeMounts": list,
    },
    "headGroupSpec": {"serviceType": {"ClusterIP"}, "rayStartParams": OPEN, "template": POD},
    "workerGroupSpecs": [{
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
        "numOfHosts": int, "rayStartParams": OPEN, "template": POD,
    }],
}  # fmt: skip
_POLICIES = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")  # in the order in which they may come
RAYJOB = {
    "entrypoint": str, "runtimeEnvYAML": str, "submissionMode": {"K8sJobMode", "HTTPMode", "SidecarMode"},
    "submitterConfig": {"backoffLimit": int}, "submitterPodTemplate": POD, "backoffLimit": int,
    "activeDeadlineSeconds": int, "preRunningDeadlineSeconds": int, "ttlSecondsAfterFinished": int,
    "shutdownAfterJobFinishes": bool, "suspend": bool,
    "deletionStrategy": {"deletionRules": [{
        "policy": {*_POLICIES, "DeleteNone"},
        "condition": {"jobStatus": {"SUCCEEDED", "FAILED"}, "jobDeploymentStatus": {"Failed"}, "ttlSeconds": int},
    }]},
    "rayClusterSpec": _CLUSTER,
}  # fmt: skip
RAYCRONJOB = {"schedule": str, "timeZone": str, "suspend": bool, "jobTemplate": RAYJOB}


def unknown(tree: Any, schema: Any, where: str) -> list[str]:
    """What of a tree is not in the schema, or of another type."""
    if schema is POD:
        return [] if isinstance(tree, dict) and set(tree) <= {"metadata", "spec"} else [f"{where}: no pod template"]
    if schema is OPEN:
        odd = [k for k, v in tree.items() if not isinstance(v, str)]
        return [f"{where}.{key}: must be a string" for key in odd]
    if isinstance(schema, dict):
        found = [f"{where}.{key}: no such field" for key in tree if key not in schema]
        return found + [m for k, v in tree.items() if k in schema for m in unknown(v, schema[k], f"{where}.{k}")]
    if isinstance(schema, list):
        return [m for n, item in enumerate(tree) for m in unknown(item, schema[0], f"{where}[{n}]")]
    if isinstance(schema, set):
        return [] if tree in schema else [f"{where}: {tree!r} is none of {sorted(schema)}"]
    right = type(tree) is schema  # bool is an int to isinstance
    return [] if right else [f"{where}: {tree!r} is no {schema.__name__}"]


def refused(job: dict[str, Any]) -> list[str]:
    """Why KubeRay, or Kueue where the job has its label, would refuse a RayJob."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    found = unknown(spec, RAYJOB, "spec")
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    scaling = cluster.get("enableInTreeAutoscaling", False)
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if len(job["metadata"]["name"]) > 47:
        found.append("a name of over 47 letters")
    if rules and shutdown:
        found.append("deletionRules and shutdownAfterJobFinishes exclude each other")
    if spec.get("ttlSecondsAfterFinished", 0) and not shutdown:
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if spec.get("suspend") and not shutdown:
        found.append("suspend needs shutdownAfterJobFinishes")
    found += _deletions(rules, scaling)
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", "0.0"))[:2])
        if version < (2, 52):
            found.append("token auth needs rayVersion 2.52 or newer")
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"workers {group['groupName']}: replicas out of their range")
    if scaling and cluster.get("autoscalerOptions", {}).get("version") == "v2":
        pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        if any(pod["template"]["spec"].get("restartPolicy", "Never") != "Never" for pod in pods):
            found.append("autoscaler v2 needs restartPolicy Never")
        env = cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])
        if any(variable["name"] == "RAY_enable_autoscaler_v2" for variable in env):
            found.append("autoscalerOptions.version and the variable exclude each other")
    if scaling is False and "autoscalerOptions" in cluster:
        found.append("autoscalerOptions without an autoscaler")
    if "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {}):
        if not shutdown:
            found.append("Kueue: shutdownAfterJobFinishes must be true")
        if scaling:
            found.append("Kueue: no autoscaling")
        if len(cluster["workerGroupSpecs"]) > 7:
            found.append("Kueue: at most 7 worker groups")
        if not spec.get("suspend"):
            found.append("Kueue: starts suspended")
    if not shlex.split(spec["entrypoint"]):
        found.append("no entrypoint")
    return found


def _deletions(rules: list[dict[str, Any]], scaling: bool) -> list[str]:
    found, waits = [], {}
    for rule in rules:
        condition, policy = rule["condition"], rule["policy"]
        named = {k: v for k, v in condition.items() if k != "ttlSeconds"}
        if len(named) != 1:
            found.append(f"{policy}: exactly one of jobStatus and jobDeploymentStatus")
            continue
        if scaling and policy == "DeleteWorkers":
            found.append("DeleteWorkers is not supported with the autoscaler")
        key = next(iter(named.items()))
        if policy in waits.setdefault(key, {}):
            found.append(f"{policy} twice for {key}")
        waits[key][policy] = condition.get("ttlSeconds", 0)
    for key, times in waits.items():
        order = [times[policy] for policy in _POLICIES if policy in times]
        if order != sorted(order):
            found.append(f"{key}: workers go before the cluster, and the cluster before the job")
    return found
