"""Promotion, rollback, deletion and their history, on small sealed versions in a real MLflow."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from darkmatter import registry
from darkmatter.registry import __main__ as command_line
from darkmatter.registry import aliases, seal

ROOT = Path(__file__).parent.parent.parent
NAME = "darkmatter-backbone"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three versions of one file of weights each; 1 and then 2 became champion, and 3 candidate."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["place"]["mlflow"] = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    registry.connect(tree["place"]["mlflow"])
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    for version in "123":
        folder = tmp_path / f"version{version}"
        folder.mkdir()
        (folder / "weights").write_text(f"weights of {version}")
        function = {"loader_module": "mlflow.pyfunc.loaders.code_model", "model_code_path": "_embedder.py"}
        mlflow.models.Model(flavors={"python_function": function}).save(str(folder / "MLmodel"))
        tags = {"seal_sha256": seal.write(folder), "weights_sha256": version}
        client.create_model_version(NAME, str(folder), tags=tags)
    aliases.move(NAME, "champion", "1", action="register", reason="there is no champion yet")
    aliases.move(NAME, "champion", "2", action="register", reason="better")
    aliases.move(NAME, "candidate", "3", action="register", reason="passed")
    return tmp_path


def champion() -> str:
    found = registry.champion(NAME)
    assert found is not None
    return found.version


def test_every_change_is_recorded_with_who_when_and_why(store: Path) -> None:
    aliases.promote(NAME, "3", reason="asked for by the search team")
    aliases.rollback(NAME, reason="it is slow")
    changes = aliases.history(NAME)
    assert [(one.action, one.alias, one.before, one.after, one.reason) for one in changes[-2:]] == [
        ("promote", "champion", "2", "3", "asked for by the search team"),
        ("rollback", "champion", "3", "2", "it is slow"),
    ]
    assert [one.time for one in changes] == sorted(one.time for one in changes)
    assert all(one.who for one in changes)
    assert champion() == "2"


def test_a_move_to_where_it_points_already_is_no_change(store: Path) -> None:
    before = aliases.history(NAME)
    aliases.move(NAME, "champion", "2", action="register", reason="again")
    assert aliases.history(NAME) == before


def test_rollbacks_go_further_back_and_end_with_a_reason(store: Path) -> None:
    aliases.promote(NAME, "3", reason="")
    assert [aliases.rollback(NAME, reason="") for _ in range(2)] == ["2", "1"]
    with pytest.raises(aliases.Refused, match="no champion before this one"):
        aliases.rollback(NAME, reason="")
    assert champion() == "1"
    aliases.promote(NAME, "3", reason="")
    assert aliases.rollback(NAME, reason="") == "1"


def test_a_rollback_passes_over_what_was_deleted(store: Path) -> None:
    aliases.promote(NAME, "3", reason="")
    aliases.delete(NAME, "2", reason="")
    assert aliases.rollback(NAME, reason="") == "1"


def test_a_rollback_after_a_move_by_other_tools_goes_to_the_last_champion_that_we_know(store: Path) -> None:
    import mlflow

    mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", "3")
    assert aliases.rollback(NAME, reason="") == "2"


def test_the_champion_cannot_be_deleted(store: Path) -> None:
    import mlflow

    with pytest.raises(aliases.Refused, match="version 2 is the champion; promote another one first"):
        aliases.delete(NAME, "2", reason="")
    assert champion() == "2"
    aliases.delete(NAME, "1", reason="too old")
    assert [one.version for one in mlflow.MlflowClient().search_model_versions(f"name='{NAME}'")] == [3, 2]
    last = aliases.history(NAME)[-1]
    assert (last.action, last.before, last.reason) == ("delete", "1", "too old")
    with pytest.raises(aliases.Refused, match=r"has no version 1 \(there is: 2, 3\)"):
        aliases.delete(NAME, "1", reason="")


def test_a_version_that_was_tampered_with_is_not_promoted(store: Path) -> None:
    (store / "version3" / "weights").write_text("others")
    with pytest.raises(seal.Broken, match="changed: weights"):
        aliases.promote(NAME, "3", reason="")
    assert champion() == "2"


def test_a_version_that_is_no_model_is_not_promoted(store: Path) -> None:
    import mlflow

    folder = store / "version4"
    folder.mkdir()
    (folder / "weights").write_text("weights of 4")
    mlflow.MlflowClient().create_model_version(NAME, str(folder), tags={"seal_sha256": seal.write(folder)})
    with pytest.raises(seal.Broken, match="it has no MLmodel"):
        aliases.promote(NAME, "4", reason="")
    assert champion() == "2"


def test_the_command_line_does_each(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        command_line.main(arguments)
        return capsys.readouterr().out

    assert run("verify", "1") == f"{NAME} version 1 is what was registered\n"
    assert run("promote", "3", "--reason", "because") == f"{NAME} version 3 is the champion\n"
    assert run("rollback") == f"{NAME} version 2 is the champion again\n"
    assert run("delete", "1") == f"{NAME} version 1 is deleted\n"
    lines = run("history").splitlines()
    assert [line.split()[1] for line in lines] == ["register"] * 3 + ["promote", "rollback", "delete"]
    assert "2 -> 3" in lines[3]
    assert lines[3].endswith(": because")
    assert "verified" in run("load", "2", "copy")
    assert (store / "copy" / "weights").read_text() == "weights of 2"
    for arguments, message in (
        (("load", "2", "copy"), "copy is there already"),
        (("promote", "9"), "MLflow: Model Version .* not found"),
        (("delete", "2"), "is the champion"),
        (("verify", "2", "--public-key", "none.pub"), "is not signed"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)


def test_a_rollback_is_one_command_of_less_than_ten_seconds(store: Path) -> None:
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "darkmatter.registry", "rollback", "--reason", "wrong"], capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{NAME} version 1 is the champion again\n"
    assert seconds < 10, "it takes five, most of it importing MLflow"
    run = subprocess.run([sys.executable, "-m", "darkmatter.registry", "rollback"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "no champion before this one" in run.stderr
    assert "Traceback" not in run.stderr
