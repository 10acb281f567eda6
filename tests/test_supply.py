"""What comes from others: pinned by hash, its licence known."""

import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from conftest import script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def supply() -> ModuleType:
    return script("docs/supply.py")


def test_every_copyleft_or_unsaid_licence_has_a_reason(supply: ModuleType) -> None:
    assert supply.unexplained() == [], "read the licence; then a line in REASONS of docs/supply.py, or another package"
    assert set(supply.REASONS) <= set(supply.locked()), "a reason for what is not used any more"


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("GPL-3.0-only", True), ("GNU Affero General Public License v3", True), ("not said", True), ("MIT", False),
        ("Apache-2.0 AND LGPL-2.1", True), ("MIT OR GPL-2.0", False), ("GPL-2.0 OR EPL-2.0", True), ("BSD License", False),
    ],
)  # fmt: skip
def test_a_new_copyleft_licence_needs_a_reason(supply: ModuleType, text: str, needed: bool) -> None:
    assert supply.needs_reason(text) is needed


def test_page_of_licences_is_not_stale(supply: ModuleType) -> None:
    there = (ROOT / "docs" / "licences.md").read_text()
    names = re.findall(r"^\| ([\w.-]+) \|", there, re.MULTILINE)[2:]
    elsewhere = re.findall(r"not looked at: (.*)\.$", there)[0].split(", ")
    assert sorted([*names, *elsewhere]) == supply.locked(), "run `make docs`"
    assert all(f"- **{name}**" in there for name in supply.REASONS), "run `make docs`"


def _plain(pin: str) -> str:
    """With the name as the index compares names."""
    name, equal, version = pin.partition("==")
    return re.sub(r"[-_.]+", "-", name) + equal + version


def test_hashes_are_those_of_the_locked_versions() -> None:
    lock = (ROOT / "requirements.lock").read_text().lower()
    pinned = {_plain(re.sub(r"\[.*?\]", "", line.partition(" ;")[0]).strip()) for line in lock.splitlines()}
    for line in (ROOT / "requirements.hashes").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+={2,3}[^ ]+ --hash=sha256:[0-9a-f]{64}", line), line
        there = _plain(line.partition(" ")[0])
        assert there in pinned, f"{there} is not what requirements.lock has; run `make hashes`"


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    """By pip, as infra's image installs."""
    wheel = tmp_path / "there" / "pinned_example-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "Metadata-Version: 2.1\nName: pinned-example\nVersion: 1.0\n"
    files = {
        "pinned_example.py": "x = 1\n",
        "pinned_example-1.0.dist-info/METADATA": about,
        "pinned_example-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        for name, text in files.items()
    }
    files["pinned_example-1.0.dist-info/RECORD"] = "".join(
        f"{name},sha256={d.decode()},\n" for name, d in digests.items()
    )
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--require-hashes"]
    for line, works in (
        (f"pinned-example==1.0 --hash=sha256:{digest}", True),
        (f"pinned-example==1.0 --hash=sha256:{digest[::-1]}", False),
        ("pinned-example==1.0", False),
    ):
        (tmp_path / "requirements.hashes").write_text(line + "\n")
        options = ["--find-links", str(wheel.parent), "--requirement", str(tmp_path / "requirements.hashes")]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stdout + done.stderr
        assert (
            works
            or "DO NOT MATCH" in done.stderr
            or "missing a hash" in done.stderr.lower()
            or "--require-hashes" in done.stderr
        )
