"""infra/monitoring: alerts that go off when they should, and no name of a number that nobody exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from rendered import INFRA, run, tool

from darkmatter.training import telemetry

MONITORING = INFRA / "monitoring"
RULES = [r for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for r in group["rules"]]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())

#: Prints the names of all series that a PromQL expression asks for; the parser is in the environment of the tools.
NAMES = """
import json, sys, promql_parser as p
def names(node):
    kind = type(node).__name__
    if kind == "VectorSelector":
        return {node.name}
    if kind == "MatrixSelector":
        return names(node.vector_selector)
    if kind == "BinaryExpr":
        children = [node.lhs, node.rhs]
    else:
        children = list(node.args) if kind == "Call" else [node.expr] if hasattr(node, "expr") else []
    return set().union(*map(names, children)) if children else set()
print(json.dumps([sorted(names(p.parse(e))) for e in json.load(sys.stdin)]))
"""


def series(expressions: list[str]) -> list[set[str]]:
    python = str(Path(tool("kubernetes-validate")).with_name("python"))
    # What Grafana fills in.
    plain = [expression.replace('"$run"', '".*"') for expression in expressions]
    done = subprocess.run([python, "-c", NAMES], input=json.dumps(plain), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(names) for names in json.loads(done.stdout)]


def panels() -> list[dict]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def of_ray() -> set[str]:
    """Names that Ray's own source gives its numbers, as Prometheus sees them."""
    folder = Path(ray.__file__).parent / "dashboard"
    sources = [folder / "modules" / "reporter" / "reporter_agent.py"]
    text = "\n".join(path.read_text() for path in sources)
    return {f"ray_{name}" for name in re.findall(r'Gauge\(\s*"(\w+)"', text)}


def test_rules_and_dashboard_name_only_numbers_that_are_exported() -> None:
    ours = {f"ray_{name}" for name in telemetry.NUMBERS}
    others = set(yaml.safe_load((MONITORING / "metrics.yaml").read_text()))
    asked = [rule["expr"] for rule in RULES] + [target["expr"] for panel in panels() for target in panel["targets"]]
    found = set().union(*series(asked))
    assert found - ours - of_ray() - others == set()
    assert others <= found, "metrics.yaml names what nothing asks for"
    assert not others & (ours | of_ray())
    assert ours <= found, "a number that we export and show nowhere"


def test_a_name_that_is_not_exported_would_be_seen() -> None:
    (found,) = series(["max by (run) (rate(ray_darkmatter_los[5m])) / on (run) ray_node_mem_used > 3"])
    assert found == {"ray_darkmatter_los", "ray_node_mem_used"}
    assert "ray_darkmatter_los" not in {f"ray_{name}" for name in telemetry.NUMBERS} | of_ray()
    assert "ray_node_mem_used" in of_ray()


def promtool_tests(folder: Path) -> tuple[bool, str]:
    done = run("promtool", "test", "rules", "rules-test.yaml", cwd=folder)
    return done.returncode == 0, done.stdout + done.stderr


def test_each_alert_goes_off_when_it_should_and_only_then() -> None:
    passed, said = promtool_tests(MONITORING)
    assert passed, said
    tested = set(re.findall(r"alertname: (\w+)", (MONITORING / "rules-test.yaml").read_text()))
    assert tested == {rule["alert"] for rule in RULES}, "each alert has a test"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(ray_darkmatter_energy_margin) <", "(ray_darkmatter_energy_margin) >"),
        ("(ray_darkmatter_steps_planned) / 3", "(ray_darkmatter_steps_planned) / 9"),
        ("_timestamp_seconds) > 900", "_timestamp_seconds) > 9000"),
        ('state="failed"}) > 0', 'state="failed"}) >= 0'),
        ("[15m])) > 0.2", "[15m])) > 0.05"),
        ('namespace="darkmatter", job_name', "job_name"),
    ],
)
def test_a_rule_that_is_wrong_fails_its_test(old: str, new: str, tmp_path: Path) -> None:
    text = (MONITORING / "rules.yaml").read_text()
    assert old in text
    (tmp_path / "rules.yaml").write_text(text.replace(old, new, 1))
    shutil.copy(MONITORING / "rules-test.yaml", tmp_path)
    assert not promtool_tests(tmp_path)[0]


@pytest.mark.parametrize("name", ["prometheus.yaml", "prometheus-kubernetes.yaml"])
def test_prometheus_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    tree = yaml.safe_load((MONITORING / name).read_text())
    for job in tree["scrape_configs"]:
        # Debian builds promtool without Kubernetes; what is beside it is checked all the same.
        for found in job.pop("kubernetes_sd_configs", []):
            assert found["role"] == "pod" and found["namespaces"]["names"]
        for found in job.get("http_sd_configs", []):
            assert found["authorization"]["type"] == "Bearer", "Ray answers with 401 otherwise"
            found["authorization"]["credentials_file"] = str(tmp_path / "token")
    (tmp_path / "token").touch()
    shutil.copy(MONITORING / "rules.yaml", tmp_path)
    path = tmp_path / name
    path.write_text(yaml.safe_dump(tree))
    done = run("promtool", "check", "config", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text(path.read_text().replace("job_name: ray\n", "job_name: ray\n  scrape_intervall: 5s\n"))
    assert run("promtool", "check", "config", str(path)).returncode != 0


def test_on_kubernetes_pods_of_runs_are_found_by_labels_and_ports_that_they_have() -> None:
    from rendered import pods_of_rayjob, rayjob

    tree = yaml.safe_load((MONITORING / "prometheus-kubernetes.yaml").read_text())
    keep = next(job for job in tree["scrape_configs"] if job["job_name"] == "ray")["relabel_configs"]
    wanted = {rule["source_labels"][0]: rule["regex"] for rule in keep if rule.get("action") == "keep"}
    for where, template in pods_of_rayjob(rayjob("gpu-nightly")["spec"]):
        labels = template["metadata"]["labels"]
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0].get("ports", [])}
        found = (
            labels["app.kubernetes.io/component"] == wanted["__meta_kubernetes_pod_label_app_kubernetes_io_component"]
            and wanted["__meta_kubernetes_pod_container_port_name"] in ports
        )
        assert found is (where != "RayJob/submitter"), where
        assert not found or ports["metrics"] == 8080


def test_the_dashboard_is_one_that_grafana_can_show() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, f"{panel['title']} lies on another"
        places |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} and "datasource" in variables
        assert panel["title"] and panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["legendFormat"]


def test_every_alert_says_what_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]
        page = (INFRA.parent / "docs" / "monitoring.md").read_text()
        assert f"`{rule['alert']}`" in page, f"docs/monitoring.md does not name {rule['alert']}"
