"""The seal of a version: SHA256SUMS names every file with its sha256; a signature of the whole by choice.

The format is that of `sha256sum`, so that `sha256sum --check SHA256SUMS` finds changed and removed files without us. The
digest of SHA256SUMS itself is a tag of the version: who rewrites a file and the seal in the store is found out by it.
"""

import tempfile
from pathlib import Path

from darkmatter import files

NAME = "SHA256SUMS"
SIGNATURE = "model.sig"
_SHOWN = 5  # names in a message


class Broken(ValueError):
    """A version is not what was registered: a file was changed, added or removed, or its signature does not fit."""


def write(folder: Path) -> str:
    """Seals the folder; nothing in it may change from here. Returns the digest of the seal."""
    names = _names(folder)
    for name in names:
        if "\n" in name or "\\" in name or (folder / name).is_symlink():
            raise ValueError(f"{name!r} cannot be sealed: a link, or a name with a line feed or a backslash")
    files.write(folder / NAME, "".join(f"{files.sha256(folder / name)}  {name}\n" for name in names))
    return files.sha256(folder / NAME)


def verify(folder: Path, digest: str) -> None:
    """Proves that the folder is what was sealed.

    Args:
        folder: a copy of a version.
        digest: of the seal, kept elsewhere: the tag `seal_sha256` of the version.

    Raises:
        Broken: naming what is wrong.
    """
    path = folder / NAME
    if not path.is_file() or files.sha256(path) != digest:
        raise Broken(f"{folder}: {NAME} is not the one that was made at registration; do not use this version")
    sealed = {name: sum_ for sum_, name in (line.split("  ", 1) for line in path.read_text().splitlines())}
    present = set(_names(folder))
    problems = {
        "removed": sorted(sealed.keys() - present),
        "added": sorted(present - sealed.keys()),
        "changed": sorted(
            name
            for name in sealed.keys() & present
            if (folder / name).is_symlink() or files.sha256(folder / name) != sealed[name]
        ),
    }
    found = [
        f"{what}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise Broken(f"{folder} is not what was registered; {'; '.join(found)}. Do not use this version")


def sign(folder: Path, private_key: Path) -> None:
    """Signs a sealed folder with model-signing (OpenSSF), as anyone can verify it with that project's own tool.

    Args:
        folder: it gets the file model.sig.
        private_key: a PEM file of an elliptic curve (P-256, P-384 or P-521), without a password.

    Raises:
        ValueError: no such file, or model-signing is not installed.
    """
    if not private_key.is_file():
        raise ValueError(f"place.signing_key: there is no file {private_key}")
    from model_signing import signing  # its import takes a second

    with tempfile.TemporaryDirectory() as scratch:  # outside of what is signed
        signature = Path(scratch) / SIGNATURE
        signing.Config().use_elliptic_key_signer(private_key=private_key).sign(folder, signature)
        files.write(folder / SIGNATURE, signature.read_bytes())


def verify_signature(folder: Path, public_key: Path) -> None:
    """
    Raises:
        Broken: there is no signature, or it is not of this key over these files.
    """
    if not (folder / SIGNATURE).is_file():
        raise Broken(f"{folder} is not signed")
    from model_signing import hashing, verifying

    ignored = hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE])
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(ignored)
    try:
        verifier.verify(folder, folder / SIGNATURE)
    except ValueError as error:
        raise Broken(f"{folder}: the signature does not fit {public_key}: {error}") from error


def _names(folder: Path) -> list[str]:
    """Everything below the folder but folders, the seal and the signature; a link to a folder is no folder."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in found} - {NAME, SIGNATURE})
