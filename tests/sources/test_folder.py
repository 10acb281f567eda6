import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import picture

from darkmatter import params
from darkmatter.sources import Item, Unreadable, folder


def read(root: Path, *, limit: int = 10_000) -> dict[str, bytes | str]:
    """Name -> bytes, or the reason why there are none."""
    source = folder.open_source(str(root))
    items = sorted(source.items(), key=lambda item: os.fsencode(item.name))
    found = source.read(items, limit=limit)
    return {i.name: one.reason if isinstance(one, Unreadable) else one for i, one in zip(items, found, strict=True)}


def test_every_file_at_any_depth_with_its_first_folder_as_label(tmp_path: Path) -> None:
    for name in ("a.png", "cats/b.png", "cats/deep/er/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert read(tmp_path) == {name: name.encode() for name in ("a.png", "cats/b.png", "cats/deep/er/c.png")}
    labels = {item.name: item.label for item in folder.open_source(str(tmp_path)).items()}
    assert labels == {"a.png": None, "cats/b.png": "cats", "cats/deep/er/c.png": "cats"}


def test_links_pipes_and_sockets_never_hang_and_never_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "real.png").write_bytes(b"real")
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "inside.png").symlink_to(root / "real.png")
    (root / "outside.png").symlink_to(tmp_path / "secret")
    (root / "up.png").symlink_to("../secret")
    (root / "nowhere.png").symlink_to("nothing")
    (root / "circle.png").symlink_to("circle.png")
    (root / "sub" / "loop").symlink_to(root)
    (root / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root)  # a socket's name has at most 108 bytes
        server.bind("socket.png")
        os.chdir(here)
    assert read(root) == {
        "circle.png": "unreadable",
        "device.png": "outside",
        "inside.png": b"real",
        "nowhere.png": "missing",
        "outside.png": "outside",
        "pipe.png": "not-a-file",
        "real.png": b"real",
        "socket.png": "unreadable",
        "sub/loop": "not-a-file",
        "up.png": "outside",
    }


def test_a_file_over_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(100))
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**42)  # four terabytes of holes
    assert read(tmp_path, limit=100) == {"huge": "too-large", "small": bytes(100)}


def test_a_file_that_vanished_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    source = folder.open_source(str(tmp_path))
    items = list(source.items())
    (tmp_path / "a").unlink()
    (answer,) = source.read(items, limit=10)
    assert isinstance(answer, Unreadable)
    assert answer.reason == "missing"


def test_names_that_are_no_text_and_names_that_are_long(tmp_path: Path) -> None:
    names = [os.fsdecode(b"latin\xe9\xff.png"), "n" * 251 + ".png", "new\nline.png", "-rf", " .png", "日本.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode(errors="surrogateescape"))
    assert read(tmp_path) == {name: name.encode(errors="surrogateescape") for name in names}


def test_a_tree_deeper_than_a_path_may_be_long_ends_with_a_reject(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            os.mkdir("abc")
            os.chdir("abc")
        Path("a.png").write_bytes(b"a")
    finally:
        os.chdir(here)
    found = read(tmp_path)
    assert list(found.values()) == ["folder"]
    subprocess.run(["rm", "-rf", str(tmp_path / "abc")], check=True)


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    for name in ("open/a.png", "shut/b.png", "closed.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "shut").chmod(0)
    (tmp_path / "closed.png").chmod(0)
    for folder_above in (tmp_path, *tmp_path.parents):
        if str(folder_above).startswith("/tmp/") and folder_above.stat().st_uid == os.getuid():
            folder_above.chmod(folder_above.stat().st_mode | 0o055)
    script = "import os, sys, test_folder; os.seteuid(65534); print(test_folder.read(test_folder.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.stdout.strip() == str({"closed.png": "forbidden", "open/a.png": b"x", "shut/": "folder"})


def test_the_version_of_a_file_changes_with_it(tmp_path: Path) -> None:
    source = folder.open_source(str(tmp_path))
    versions, states = [], [source.state()]
    for content, time in ((b"1", 1), (b"12", 1), (b"12", 2)):
        (tmp_path / "a").write_bytes(content)
        os.utime(tmp_path / "a", (time, time))
        versions += [item.version for item in source.items()]
        states.append(source.state())
    (tmp_path / "a").rename(tmp_path / "b")
    states.append(source.state())
    assert len(set(versions)) == 3
    assert len(set(states)) == 5
    assert source.state() == states[-1]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(params.ParamsError, match="is not a folder"):
        folder.open_source(str(tmp_path / "nothing"))


def test_the_order_of_a_listing_does_not_change_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / str(number)).write_bytes(picture(number))
    source = folder.open_source(str(tmp_path))
    state, items = source.state(), list(source.items())
    monkeypatch.setattr(folder.Folder, "items", lambda self: iter(items[::-1]))
    assert source.state() == state
    monkeypatch.setattr(folder.Folder, "items", lambda self: iter([*items, Item("6")]))
    assert source.state() != state
