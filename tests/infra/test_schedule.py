"""infra/schedule and infra/ray: each file as its own program reads it, and what submit.sh does with how a run ends."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rendered import INFRA, ROOT, manifests, one, run

SCHEDULE = INFRA / "schedule"
SCRIPTS = sorted(INFRA.rglob("*.sh"))


def shellcheck(path: Path) -> str:
    done = run("shellcheck", str(path))
    return "" if done.returncode == 0 else done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck_and_stop_at_errors(script: Path) -> None:
    assert shellcheck(script) == ""
    assert "set -euo pipefail" in script.read_text() and os.access(script, os.X_OK)


def test_shellcheck_would_see(tmp_path: Path) -> None:
    text = (SCHEDULE / "submit.sh").read_text()
    (tmp_path / "submit.sh").write_text(text.replace('"$REPOSITORY" --ref', "$REPOSITORY --ref"))
    assert "SC2086" in shellcheck(tmp_path / "submit.sh")


#: In place of Python: notes its arguments and ends as one after the other of the statuses it is given.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$NOTES"
status="$(head -n 1 "$STATUSES")"; sed -i 1d "$STATUSES"; exit "$status"
"""


@pytest.mark.parametrize(
    ("statuses", "ends", "tries"),
    [((0,), 0, 1), ((3,), 3, 1), ((1,), 1, 1), ((75, 0), 0, 2), ((75, 75, 75), 75, 3), ((75, 3), 3, 2)],
)
def test_a_run_that_asks_for_another_try_gets_it(tmp_path: Path, statuses: tuple, ends: int, tries: int) -> None:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    environment = {
        "PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "NOTES": str(tmp_path / "notes"),
        "STATUSES": str(tmp_path / "statuses"), "PAUSE": "0", "REPOSITORY": "https://example.com/a b.git",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
    }  # fmt: skip
    done = subprocess.run([str(SCHEDULE / "submit.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == ends, done.stderr
    notes = (tmp_path / "notes").read_text().splitlines()
    assert len(notes) == tries and len(set(notes)) == 1
    assert notes[0].startswith("-m darkmatter.jobs submit --repository https://example.com/a b.git --ref main")


def test_without_a_repository_it_says_so() -> None:
    done = subprocess.run(
        [str(SCHEDULE / "submit.sh")], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "what git clone takes" in done.stderr


def systemd(folder: Path, **changes: str) -> str:
    """What `systemd-analyze verify` says of the units, whose program is taken to be here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    for path in SCHEDULE.glob("darkmatter-nightly.*"):
        text = path.read_text().replace("/opt/source/", f"{ROOT}/")
        for old, new in changes.items():
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    paths = sorted(str(path) for path in folder.glob("darkmatter-nightly.*"))
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True)
    return done.stderr + (f"status {done.returncode}" if done.returncode else "")


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    said = [line for line in systemd(tmp_path).splitlines() if "darkmatter" in line]
    assert said == []


@pytest.mark.parametrize("old", ["TimeoutStartSec", "OnCalendar"])
def test_systemd_would_refuse(old: str, tmp_path: Path) -> None:
    assert f"{old}X" in systemd(tmp_path, **{old: f"{old}X"})


def cron_lines() -> list[str]:
    lines = (SCHEDULE / "darkmatter.cron").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#") and not re.match(r"\w+=", line)]


def test_the_cron_line_has_five_times_a_user_and_a_command() -> None:
    (line,) = cron_lines()
    *times, user, command = line.split(maxsplit=6)
    assert len(times) == 5 and user == "darkmatter"
    for field, (least, most) in zip(times, [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], strict=True):
        assert field == "*" or least <= int(field) <= most
    assert "%" not in command, "cron makes new lines of them"
    assert command.endswith("/infra/schedule/submit.sh")


def test_all_schedules_are_the_same_hour() -> None:
    hour = one(manifests("small"), "CronJob", "darkmatter-nightly")["spec"]["schedule"]
    (line,) = cron_lines()
    workflow = yaml.safe_load((SCHEDULE / "github-actions.yaml").read_text())
    timer = (SCHEDULE / "darkmatter-nightly.timer").read_text()
    assert " ".join(line.split()[:5]) == hour == workflow[True]["schedule"][0]["cron"]  # YAML reads `on` as true
    assert f'schedule="{hour}"' in (SCHEDULE / "airflow_dag.py").read_text()
    minute, clock = hour.split()[:2]
    assert f"OnCalendar=*-*-* {int(clock):02}:{int(minute):02}:00 UTC" in timer


def workflow_errors(path: Path) -> str:
    done = run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(path))
    return "" if done.returncode == 0 else done.stdout


def test_the_workflow_is_one_and_takes_no_rights_and_no_tag(tmp_path: Path) -> None:
    path = SCHEDULE / "github-actions.yaml"
    assert workflow_errors(path) == ""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for step in (step for job in workflow["jobs"].values() for step in job["steps"]):
        assert "uses" not in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), "an action by its commit"
        assert "${{" not in step.get("run", ""), "text of others in a shell"
    (tmp_path / "broken.yaml").write_text(path.read_text().replace("runs-on:", "run-on:"))
    assert workflow_errors(tmp_path / "broken.yaml") != ""


def test_the_dag_is_python_with_one_task_that_submits() -> None:
    """Airflow is no dependency; it was loaded by Airflow's SDK once, see DECISIONS.md."""
    tree = ast.parse((SCHEDULE / "airflow_dag.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "BashOperator"]
    (options,) = [{k.arg: k.value for k in call.keywords} for call in calls]
    command = ast.literal_eval(options["bash_command"])
    assert command.endswith("submit.sh ") and ast.literal_eval(options["skip_on_exit_code"]) == 3


def test_what_each_schedule_sets_submit_reads() -> None:
    read = set(re.findall(r"\$\{(\w+):[?=]", (SCHEDULE / "submit.sh").read_text())) | {
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    }
    given = {
        "nightly.env": set(re.findall(r"^(\w+)=", (SCHEDULE / "nightly.env").read_text(), re.MULTILINE)),
        "github": set(yaml.safe_load((SCHEDULE / "github-actions.yaml").read_text())["jobs"]["run"]["steps"][1]["env"]),
        "airflow": set(re.findall(r'^ {12}"(\w+)":', (SCHEDULE / "airflow_dag.py").read_text(), re.MULTILINE)),
    }
    for where, names in given.items():
        assert {"REPOSITORY", "RAY_API_SERVER_ADDRESS"} <= names <= read, where


RAY_CHECK = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))
"""


@pytest.mark.parametrize("spoil", ["", "max_workers", "head_start_ray_commands", "idle_timeout_minutes"])
def test_rays_launcher_accepts_the_cluster_and_would_refuse_another(spoil: str, tmp_path: Path) -> None:
    text = (INFRA / "ray" / "cluster.yaml").read_text()
    (tmp_path / "cluster.yaml").write_text(text.replace(f"\n{spoil}:", f"\n{spoil}x:") if spoil else text)
    done = subprocess.run(
        [sys.executable, "-c", RAY_CHECK, str(tmp_path / "cluster.yaml")], capture_output=True, text=True
    )
    assert (done.returncode == 0) is not bool(spoil), done.stderr


def test_machines_of_the_cluster_start_ray_with_a_token_only_and_have_no_public_address() -> None:
    tree = yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text())
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = tree[key]
        assert command.index("RAY_AUTH_MODE=token") < command.index("ray start")
        assert (
            "RAY_AUTH_TOKEN_PATH=~/.ray/auth_token" in command and "/home/ubuntu/.ray/auth_token" in tree["file_mounts"]
        )
    assert "--dashboard-host=127.0.0.1" in tree["head_start_ray_commands"][0]
    assert tree["provider"]["use_internal_ips"] is True
    for rule in tree["provider"]["security_group"]["IpPermissions"]:
        assert rule["FromPort"] == 22 and all(one["CidrIp"] != "0.0.0.0/0" for one in rule["IpRanges"])
    assert tree["available_node_types"]["gpu"]["min_workers"] == 0
