import subprocess
from pathlib import Path

import pytest

from darkmatter.registry import seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("MLmodel", "artifacts/version/a.safetensors", "artifacts/version/records/é ü.txt"):
        path = tmp_path / "sealed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode() * 50)
    return tmp_path / "sealed"


def test_an_untouched_folder_is_what_was_sealed(folder: Path) -> None:
    seal.verify(folder, seal.write(folder))


@pytest.mark.parametrize("position", [0, 333, -1])
@pytest.mark.parametrize("name", ["MLmodel", "artifacts/version/a.safetensors"])
def test_one_flipped_bit_is_refused(folder: Path, name: str, position: int) -> None:
    digest = seal.write(folder)
    content = bytearray((folder / name).read_bytes())
    content[position] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(seal.Broken, match=f"changed: {name}"):
        seal.verify(folder, digest)


@pytest.mark.parametrize("name", ["new.py", "artifacts/version/records/new", "artifacts/version/.hidden"])
def test_one_added_file_is_refused(folder: Path, name: str) -> None:
    digest = seal.write(folder)
    (folder / name).write_text("")
    with pytest.raises(seal.Broken, match=f"added: {name}"):
        seal.verify(folder, digest)


def test_one_removed_file_is_refused(folder: Path) -> None:
    digest = seal.write(folder)
    (folder / "MLmodel").unlink()
    with pytest.raises(seal.Broken, match="removed: MLmodel"):
        seal.verify(folder, digest)


def test_a_link_in_place_of_a_file_is_refused_although_its_content_is_the_same(folder: Path) -> None:
    digest = seal.write(folder)
    (folder / "MLmodel").rename(folder.parent / "elsewhere")
    (folder / "MLmodel").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(seal.Broken, match="changed: MLmodel"):
        seal.verify(folder, digest)
    (folder / "MLmodel").unlink()
    (folder.parent / "elsewhere").rename(folder / "MLmodel")
    (folder / "more").symlink_to(folder.parent)
    with pytest.raises(seal.Broken, match="added: more"):
        seal.verify(folder, digest)


def test_a_seal_that_was_written_anew_is_refused(folder: Path) -> None:
    digest = seal.write(folder)
    (folder / "MLmodel").write_text("other")
    seal.write(folder)
    with pytest.raises(seal.Broken, match="SHA256SUMS is not the one"):
        seal.verify(folder, digest)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(seal.Broken, match="SHA256SUMS is not the one"):
        seal.verify(folder, digest)


def test_a_link_cannot_be_sealed(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "MLmodel")
    with pytest.raises(ValueError, match="'link' cannot be sealed"):
        seal.write(folder)


def test_sha256sum_reads_the_seal(folder: Path) -> None:
    seal.write(folder)
    run = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder / "MLmodel").write_text("other")
    run = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert "MLmodel: FAILED" in run.stdout


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key of the curve P-256, in PEM files."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    content = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.pem").write_bytes(content)
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


def test_a_signature_is_of_this_key_over_these_files(folder: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "ours")
    _, stranger = keys(tmp_path, "stranger")
    digest = seal.write(folder)
    with pytest.raises(seal.Broken, match="is not signed"):
        seal.verify_signature(folder, public)
    seal.sign(folder, private)
    seal.verify(folder, digest)
    seal.verify_signature(folder, public)
    with pytest.raises(seal.Broken, match="does not fit"):
        seal.verify_signature(folder, stranger)
    (folder / "MLmodel").write_text("other")
    seal.write(folder)  # who can write into the store writes a fitting seal, but has no key
    with pytest.raises(seal.Broken, match="does not fit"):
        seal.verify_signature(folder, public)


def test_a_key_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"place\.signing_key: there is no file .*none\.pem"):
        seal.sign(folder, folder / "none.pem")
