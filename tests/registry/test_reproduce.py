"""What is known before a version is trained again. The training itself is in tests/pipelines."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from darkmatter import lineage
from darkmatter.registry import __main__ as command_line
from darkmatter.registry import reproduce

PLACE = {"workers": 1, "cpus_per_worker": 2, "mlflow": "postgresql://me:secret@host/db", "max_restarts": 7}
COMPUTED = {
    "workers": [1], "cpus_per_worker": 2, "gpu": False, "compile": False, "fsdp": False,
    "processor": torch.backends.cpu.get_cpu_capability(),
}  # fmt: skip


def origin(tmp_path: Path, **known: Any) -> reproduce.Origin:
    values = {
        "git_commit": "0" * 40, "uncommitted": [], "versions": lineage.versions(), "computed": COMPUTED,
        "seed": 0, "fingerprint": "f" * 16,
    }  # fmt: skip
    return reproduce.Origin(
        inside=tmp_path, lineage={**values, **known}, params={"source": {"uri": "builtin:mnist"}}, lock={}
    )


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a folder of a repository, with two commits, of which no branch has the second any more."""
    project = tmp_path / "top" / "project"
    package = project / "components" / "darkmatter" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    monkeypatch.chdir(project)
    git("init", "-q", str(tmp_path / "top"))
    for number in (1, 2):
        tree = {"source": {"uri": "builtin:mnist"}, "place": {"workers": 9, "mlflow": "", "older_key": number}}
        (project / "params.yaml").write_text(yaml.safe_dump(tree))
        git("add", "-A")
        git("commit", "-qm", f"commit {number}")
    return project


def test_what_was_not_committed_cannot_be_had_again_but_for_params_which_the_version_keeps(
    repository: Path, tmp_path: Path
) -> None:
    commit = git("rev-parse", "HEAD")
    with pytest.raises(reproduce.NotReproduced, match=r"nobody kept what they held: components/new\.py$"):
        reproduce._require_commit(
            origin(tmp_path, git_commit=commit, uncommitted=["project/params.yaml", "components/new.py"])
        )
    only_params = origin(tmp_path, git_commit=commit, uncommitted=["project/params.yaml"])
    assert reproduce._require_commit(only_params) == tmp_path / "top"


def test_a_folder_outside_of_a_repository_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="in no Git repository"):
        reproduce._require_commit(origin(tmp_path))


def test_a_commit_that_no_branch_has_any_more_is_cloned_with_the_params_of_the_version(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git("rev-parse", "HEAD")
    git("reset", "-q", "--hard", "HEAD~1")
    monkeypatch.setenv("DVC_EXP_NAME", "trial")
    made = origin(tmp_path, git_commit=commit, computed={**COMPUTED, "workers": [3]})
    project = reproduce._clone(made, reproduce._require_commit(made), PLACE, tmp_path / "out", start=None)
    assert project == tmp_path / "out" / "repository" / "project"
    tree = yaml.safe_load((project / "params.yaml").read_text())
    # The keys of that commit; as many workers as then; nothing that leads to the user's registry.
    assert tree["place"] == {"workers": 3, "mlflow": "sqlite:///mlflow.db", "older_key": 2}
    assert (project / ".dvc" / "config.local").read_text() == f"[cache]\n    dir = {tmp_path}/out/dvc-cache\n"
    assert git("rev-parse", "HEAD") != commit
    seen = reproduce._run(project, "-c", "import os; print(sorted(os.environ))", quiet=True)
    assert "DVC_EXP_NAME" not in seen


def test_code_that_python_finds_elsewhere_is_not_what_is_reproduced(repository: Path, tmp_path: Path) -> None:
    (repository / "components" / "darkmatter" / "__init__.py").unlink()
    git("commit", "-qam", "no package")
    made = origin(tmp_path, git_commit=git("rev-parse", "HEAD"))
    with pytest.raises(reproduce.NotReproduced, match="Python finds darkmatter in"):
        reproduce._clone(made, reproduce._require_commit(made), PLACE, tmp_path / "out", start=None)


def test_a_command_that_fails_ends_it_with_a_word(tmp_path: Path) -> None:
    with pytest.raises(reproduce.NotReproduced, match=r"could not be rebuilt: `-c raise SystemExit\(3\)`"):
        reproduce._run(tmp_path, "-c", "raise SystemExit(3)")


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"versions": {**lineage.versions(), "torch": "1.0"}}, ["trained with torch 1.0, here is "]),
        ({"computed": {**COMPUTED, "processor": "NEON"}}, ["instructions NEON of a processor"]),
        ({"computed": {**COMPUTED, "gpu": True}}, ["trained on GPUs"]),
        ({"computed": {**COMPUTED, "workers": [1, 2]}}, ["by 1 and 2 workers in turn"]),
        ({"computed": None}, ["does not say by how many workers it was trained; 1 of 2 CPUs"]),
        ({}, []),
    ],
    ids=["library", "processor", "gpu", "elastic", "old", "none"],
)
def test_what_may_lead_to_other_weights_is_named(known: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    found = list(reproduce.doubts(origin(tmp_path, **known), PLACE))
    assert len(found) == len(words)
    for one, word in zip(found, words, strict=True):
        assert word in one


def test_a_source_that_is_named_from_this_folder_is_found_from_the_clone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "mnist").mkdir()
    for uri, wanted in (
        ("folder:photos", f"folder:{tmp_path}/photos"),
        ("folder:gone", "folder:gone"),
        ("folder:/data/photos", "folder:/data/photos"),
        ("folder:s3://bucket/photos", "folder:s3://bucket/photos"),
        ("builtin:mnist", "builtin:mnist"),
    ):
        assert reproduce._from_anywhere(uri, tmp_path) == wanted


def test_the_command_refuses_a_folder_that_is_there(repository: Path, tmp_path: Path) -> None:
    params = Path(__file__).parent.parent.parent / "params.yaml"
    (repository / "params.yaml").write_text(params.read_text())
    with pytest.raises(ValueError, match="is there already; name a new folder"):
        command_line.main(["reproduce", "1", "--folder", str(tmp_path)])
