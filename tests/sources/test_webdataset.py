import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from hostile import picture, special, tar_of

from darkmatter import params
from darkmatter.sources import Unreadable, webdataset

Found = dict[str, tuple[bytes | str, str | None]]


def read(location: str, *, limit: int = 10_000) -> Found:
    """Name -> (bytes or the reason why there are none, label)."""
    source = webdataset.open_source(location)
    items = list(source.items())
    answers = source.read(items, limit=limit)
    return {
        item.name: (one.reason if isinstance(one, Unreadable) else one, item.label)
        for item, one in zip(items, answers, strict=True)
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # WebDataset leaves the tar open
def test_what_webdatasets_own_writer_wrote(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a-000.tar"), mtime=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:04d}", "png": picture(number), "cls": number % 2, "json": {"n": number}})
    expected = {f"a-000.tar!{number:04d}.png": (picture(number), str(number % 2)) for number in range(5)}
    assert read(str(tmp_path / "a-000.tar")) == expected
    theirs = wds.WebDataset(str(tmp_path / "a-000.tar"), shardshuffle=False)
    assert [one["png"] for one in theirs] == [content for content, _ in expected.values()]


def test_braces_stars_and_folders(tmp_path: Path) -> None:
    for number in range(3):
        tar_of(tmp_path / f"part-{number:03d}.tar", [("x.png", picture(number))])
    names = [f"part-{number:03d}.tar!x.png" for number in range(3)]
    assert list(read(f"{tmp_path}/part-{{000..002}}.tar")) == names
    assert list(read(f"{tmp_path}/part-{{000,002}}.tar")) == [names[0], names[2]]
    assert list(read(f"{tmp_path}/part-*.tar")) == names
    assert list(read(str(tmp_path))) == names


def test_members_that_are_no_files_and_names_that_lead_out_are_names_only(tmp_path: Path) -> None:
    odd = [
        special("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
        special("soft.png", tarfile.SYMTYPE, "../../etc/passwd"),
        special("device.png", tarfile.CHRTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
        special("folder", tarfile.DIRTYPE),
    ]
    members = [("../../../tmp/out.png", picture(1)), ("/absolute.png", picture(2)), ("text.txt", b"x")]
    tar_of(tmp_path / "odd.tar", members, odd=odd)
    assert read(str(tmp_path / "odd.tar")) == {
        "odd.tar!../../../tmp/out.png": (picture(1), None),
        "odd.tar!/absolute.png": (picture(2), None),
        "odd.tar!text": ("no-image", None),
        **{f"odd.tar!{kind}.png": ("not-a-file", None) for kind in ("hard", "soft", "device", "pipe")},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.tar"]


def test_equal_keys_are_different_files(tmp_path: Path) -> None:
    members = [
        ("a.png", picture(1)),
        ("a.png", picture(2)),
        ("a.cls", b"dog"),
        ("b.jpg", picture(3)),
        ("a.png", picture(4)),
    ]
    tar_of(tmp_path / "t.tar", members)
    assert read(str(tmp_path / "t.tar")) == {
        "t.tar!a.png": (picture(1), None),
        "t.tar!a.png#2": (picture(2), "dog"),
        "t.tar!b.jpg": (picture(3), None),
        "t.tar!a.png#3": (picture(4), None),
    }


@pytest.mark.parametrize("end", ["in a header", "in a member", "without an end mark"])
def test_a_tar_that_was_cut_off_gives_what_it_has_and_says_so(tmp_path: Path, end: str) -> None:
    path = tar_of(tmp_path / "t.tar", [(f"{number}.png", picture(number)) for number in range(4)])
    size = {"in a header": 3 * 1024 + 100, "in a member": 3 * 1024 + 530, "without an end mark": 3 * 1024}[end]
    os.truncate(path, size)
    found = read(str(path))
    assert [found[f"t.tar!{number}.png"][0] for number in range(3)] == [picture(number) for number in range(3)]
    assert found["t.tar!"] == ("damaged-tar", None)
    if end == "in a member":
        assert found["t.tar!3.png"] == ("unreadable", None)


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "t.tar", [(f"{number}.png", picture(number)) for number in range(4)])
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 150] ^= 255  # the checksum of the third header
    path.write_bytes(bytes(content))
    assert list(read(str(path)).values()) == [(picture(0), None), (picture(1), None), ("damaged-tar", None)]


@pytest.mark.parametrize("content", [b"", b"no tar", bytes(100), os.urandom(5000)])
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    assert list(read(str(tmp_path / "t.tar")).values()) == [("damaged-tar", None)]


def test_a_compressed_tar_is_named(tmp_path: Path) -> None:
    import gzip

    inner = tar_of(tmp_path / "inner", [("a.png", picture(1))]).read_bytes()
    (tmp_path / "t.tar").write_bytes(gzip.compress(inner))
    assert list(read(str(tmp_path / "t.tar")).values()) == [("damaged-tar", None)]


def test_a_member_that_claims_to_be_huge_is_not_allocated(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.png")
    info.size = 2**40
    file = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    (tmp_path / "t.tar").write_bytes(file.getvalue())
    assert {answer for answer, _ in read(str(tmp_path / "t.tar")).values()} == {"too-large", "damaged-tar"}


def test_the_state_names_the_tars_and_not_their_members(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "t.tar", [("a.png", picture(1))])
    source = webdataset.open_source(str(path))
    before = source.state()
    assert source.state() == before
    tar_of(path, [("a.png", picture(2)), ("b.png", picture(3))])
    assert source.state() != before


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(params.ParamsError, match="missing"):
        webdataset.open_source(str(tmp_path / "none.tar"))
