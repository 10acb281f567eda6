import subprocess
from pathlib import Path

import pytest

from darkmatter import lineage

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "components" / "darkmatter"


def test_imports_are_followed_through_other_files_and_into_functions() -> None:
    found = {path.relative_to(PACKAGE).as_posix() for path in lineage.imported_files(ROOT / "pipelines" / "ingest.py")}
    assert {"ingest.py", "shards.py", "cluster.py", "sources/__init__.py", "params.py", "__init__.py"} <= found
    assert "training/loop.py" not in found


def test_code_digest_ignores_comments_and_layout_but_not_code(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        path = tmp_path / "code.py"
        path.write_text(text)
        lineage._imports.cache_clear()
        return lineage.code_digest([path])

    assert digest("x = 1\n") == digest("x   =   1  # one\n\n")
    assert digest("x = 1\n") != digest("x = 2\n")


def test_code_digest_sees_a_change_in_an_imported_file() -> None:
    entry = PACKAGE / "training" / "pretrain.py"
    assert PACKAGE / "stream.py" in lineage.imported_files(entry)
    before = lineage.code_digest([entry])
    assert before == lineage.code_digest([entry, PACKAGE / "stream.py"])
    assert before != lineage.code_digest([entry, PACKAGE / "objectives" / "vicreg.py"])


def test_fingerprint_depends_on_every_part_and_not_on_key_order() -> None:
    assert lineage.fingerprint({"a": 1, "b": 2}) == lineage.fingerprint({"b": 2, "a": 1})
    assert lineage.fingerprint("data", {"a": 1}) != lineage.fingerprint("data", {"a": 2})


def test_git_commit_names_changed_files_of_code_and_params_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lineage.git_commit() == {"commit": None, "dirty": []}
    for name in ("params.yaml", "components/a.py", "metrics/ingest.json", "dvc.lock", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e@example.org commit -qm m"):
        subprocess.run(["git", *command.split()], check=True)
    assert len(lineage.git_commit()["commit"]) == 40
    assert lineage.git_commit()["dirty"] == []
    for name in (
        "metrics/ingest.json",
        "dvc.lock",
        "notes.txt",
        "more.txt",
    ):  # what a run changes, and what no stage reads
        (tmp_path / name).write_text("2")
    assert lineage.git_commit()["dirty"] == []
    (tmp_path / "params.yaml").write_text("2")
    (tmp_path / "components" / "a.py").rename(tmp_path / "components" / "a b.py")
    assert sorted(lineage.git_commit()["dirty"]) == ["components/a b.py", "components/a.py", "params.yaml"]
