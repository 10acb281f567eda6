"""infra/docker: what the linters say, and what they cannot know. Nothing is built here: there is no Docker engine."""

import re
from pathlib import Path

import pytest
import yaml
from rendered import INFRA, ROOT, run

DOCKERFILE = INFRA / "docker" / "Dockerfile"
COMPOSE = INFRA / "docker" / "compose.yaml"


def hadolint(path: Path) -> str:
    done = run("hadolint", "--failure-threshold", "info", str(path))
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_dockerfile_passes_its_linter() -> None:
    assert hadolint(DOCKERFILE) == ""


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM base AS run", "FROM debian:latest AS run", "DL3007"),
        ("pip install --no-cache-dir --no-deps --require-hashes", "pip install --require-hashes", "DL3042"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ("WORKDIR /home/darkmatter", "WORKDIR home", "DL3000"),
    ],
)
def test_the_linter_would_see(old: str, new: str, rule: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new, 1))
    assert rule in hadolint(tmp_path / "Dockerfile")


def stages() -> dict[str, list[str]]:
    """Lines of each stage of the Dockerfile, without comments, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.startswith("FROM"):
            found[line.split()[-1]] = []
        elif found and line.strip():
            list(found.values())[-1].append(line)
    return found


@pytest.mark.parametrize("target", ["run", "create", "mlflow"])
def test_what_runs_is_nobody_behind_an_init_and_has_no_build_tools(target: str) -> None:
    lines = stages()[target]
    assert "USER 10001:10001" in lines and 'ENTRYPOINT ["tini", "-g", "--"]' in lines
    assert not [line for line in lines if line.startswith(("RUN", "ADD"))]
    assert all(line.startswith("COPY --from=") for line in lines if line.startswith("COPY"))
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["10001:10001"] and "useradd --uid 10001" in " ".join(stages()["base"])


def test_no_image_has_a_default_that_could_change_under_us() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^ARG (.*)$", text, re.MULTILINE) == ["PYTHON_IMAGE", "KUBECTL_IMAGE=scratch"]
    known = set(stages()) | {"${PYTHON_IMAGE}", "${KUBECTL_IMAGE}"}
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= known


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {
        line[1:] for line in (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for lines in stages().values():
        for line in lines:
            if line.startswith("COPY") and "--from" not in line:
                sources = line.split()[1:-1]
                assert all((ROOT / name).exists() for name in sources) and set(sources) <= kept, line


def test_packages_of_a_run_are_installed_by_their_hashes() -> None:
    (install,) = [line for line in stages()["packages"] if "--requirement" in line]
    assert "--require-hashes" in install and "requirements.hashes" in install


def test_constraints_of_the_server_are_the_locked_versions_without_extras() -> None:
    """pip takes no extras in constraints, and `===` only as a requirement."""
    command = next(line for line in stages()["mlflow-packages"] if "sed" in line)
    first, second = re.search(r"sed -E '(s/.*?/.*?/); (s/.*?/.*?/)'", command).groups()
    (_, pattern, to, _), (_, other, other_to, _) = first.split("/"), second.split("/")
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            made = re.sub(other, other_to, re.sub(pattern, to, line, count=1), count=1)
            assert re.match(r"^[A-Za-z0-9._-]+==[^=]", made), line


def test_the_compose_file_is_one(tmp_path: Path) -> None:
    def errors(path: Path) -> str:
        done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(path))
        return "" if done.returncode == 0 else done.stdout

    assert errors(COMPOSE) == ""
    (tmp_path / "compose.yaml").write_text(COMPOSE.read_text().replace("depends_on:", "depend_on:", 1))
    assert "depend_on" in errors(tmp_path / "compose.yaml")


def test_the_compose_file_listens_on_loopback_only_and_takes_no_default_password() -> None:
    text = COMPOSE.read_text()
    services = yaml.safe_load(text)["services"]
    for name, service in services.items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        image = service["image"]
        assert "build" in service or ":?" in image, f"{name}: whoever starts it names the image with its digest"
    example = (INFRA / "docker" / "example.env").read_text()
    named = set(re.findall(r"\$\{(\w+)", text))
    given = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    assert named == given.keys() and not any(given.values()), "example.env names each variable and gives none a value"
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == named - {"DARKMATTER_WEBHOOK"}, "one that is not set must end it, not be empty"


def test_the_database_is_reached_by_mlflow_alone() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    assert compose["networks"]["inside"] == {"internal": True}
    inside = {name for name, service in compose["services"].items() if "inside" in service.get("networks", [])}
    assert inside == {"postgres", "mlflow"} and compose["services"]["postgres"]["networks"] == ["inside"]
