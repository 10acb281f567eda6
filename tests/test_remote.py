"""Reading from a real S3 server and over HTTP, with what goes wrong there."""

import functools
import http.server
import threading
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import s3
from darkmatter import remote
from darkmatter.remote import Unreadable
from darkmatter.sources import folder, manifest, parquet, webdataset

CONTENT = bytes(range(256)) * 2000


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("s3")
    for name in ("bucket/a.bin", "bucket/cats/b.bin", "bucket/cats/deep/c.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(CONTENT + name.encode())
    with s3.server(root) as found:
        (root / "port").write_text(str(root))
        server_root[found] = root
        yield found


server_root: dict[int, Path] = {}


@pytest.fixture
def line(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Line]:
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    made = s3.Line(port)
    s3.use(monkeypatch, made.port)
    yield made
    made.close()


def reason(address: str, **options: int) -> str:
    with pytest.raises(Unreadable) as caught:
        remote.read(address, **{"limit": 10**7, **options})
    return caught.value.reason


def test_whole_files_parts_and_listings(line: s3.Line) -> None:
    assert remote.read("s3://bucket/a.bin", limit=10**7) == CONTENT + b"bucket/a.bin"
    assert remote.read("s3://bucket/cats/b.bin", limit=10**7, start=1000, size=77) == CONTENT[1000:1077]
    entries = {entry.path: entry.version for entry in remote.listing("s3://bucket")}
    assert set(entries) == {"a.bin", "cats/b.bin", "cats/deep/c.bin"}
    assert all(entries.values())
    assert remote.version("s3://bucket/a.bin") == entries["a.bin"]
    assert [entry.path for entry in remote.listing("s3://bucket/cats")] == ["b.bin", "deep/c.bin"]
    assert remote.expand("s3://bucket/cats/*.bin") == ["s3://bucket/cats/b.bin"]


def test_the_version_of_an_object_changes_with_it(port: int, line: s3.Line) -> None:
    path = server_root[port] / "bucket" / "changing.bin"
    path.write_bytes(b"1")
    before = remote.version("s3://bucket/changing.bin")
    path.write_bytes(b"2" * 5)
    assert remote.version("s3://bucket/changing.bin") != before
    path.unlink()


def test_what_no_second_attempt_would_mend_is_named_at_once(
    port: int, line: s3.Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason("s3://bucket/nothing.bin") == "missing"
    assert reason("s3://nowhere/a.bin") == "missing"
    assert reason("s3://bucket/a.bin", limit=1000) == "too-large"
    s3.use(monkeypatch, line.port, secret="wrong")
    assert reason("s3://bucket/a.bin") == "forbidden"
    s3.use(monkeypatch, line.port, key="nobody")
    assert reason("s3://bucket/a.bin") == "forbidden"


@pytest.mark.parametrize("fault", ["cut", "stall", "refuse"])
def test_a_line_that_fails_now_and_then_is_tried_again(line: s3.Line, fault: str) -> None:
    line.faults = [fault, "", fault]
    assert remote.read("s3://bucket/a.bin", limit=10**7) == CONTENT + b"bucket/a.bin"
    assert not line.faults


def test_a_line_that_always_fails_is_named_after_the_last_attempt(
    line: s3.Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    line.faults = ["refuse"] * 100
    with pytest.raises(Unreadable, match=r"connection: s3://bucket/a.bin: .* \(tried 3 times\)"):
        remote.read("s3://bucket/a.bin", limit=10**7)
    line.faults = []


def test_every_source_reads_from_there(port: int, line: s3.Line) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent / "sources"))
    import pyarrow as pa
    import pyarrow.parquet as pq
    from hostile import picture, tar_of

    root = server_root[port] / "pictures"
    pictures = [picture(number) for number in range(6)]
    (root / "files" / "cat").mkdir(parents=True)
    for number, content in enumerate(pictures):
        (root / "files" / "cat" / f"{number}.png").write_bytes(content)
    for part in range(2):
        members = [(f"{number}.png", pictures[number]) for number in range(3 * part, 3 * part + 3)]
        tar_of(root / f"part-{part:03d}.tar", members)
    pq.write_table(pa.table({"image": pictures}), root / "table.parquet", row_group_size=4)
    (root / "list.csv").write_text("\n".join(["path", *(f"files/cat/{n}.png" for n in range(6))]))
    for source in (
        folder.open_source("s3://pictures/files"),
        webdataset.open_source("s3://pictures/part-{000..001}.tar"),
        webdataset.open_source("s3://pictures"),
        parquet.open_source("s3://pictures/table.parquet"),
        manifest.open_source("s3://pictures/list.csv"),
    ):
        items = sorted(source.items(), key=lambda item: item.name)
        assert list(source.read(items, limit=10_000)) == pictures, source
        assert source.state() == source.state()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which is busy sometimes and keeps some things to itself."""

    fails = 0

    def send_head(self) -> typing.Any:
        if self.command == "GET" and Handler.fails:
            Handler.fails -= 1
            self.send_error(503)
            return None
        if "private" in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    remote._opened.cache_clear()
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_over_http(site: str) -> None:
    assert remote.read(f"{site}/a.bin", limit=10**7) == CONTENT
    assert reason(f"{site}/nothing") == "missing"
    assert reason(f"{site}/private") == "forbidden"
    assert reason(f"{site}/a.bin", limit=100) == "too-large"
    Handler.fails = 2
    assert remote.read(f"{site}/a.bin", limit=10**7) == CONTENT
    assert Handler.fails == 0


def test_the_password_of_a_web_server_comes_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no address has to hold one."""
    import base64
    import http.server
    import threading

    wanted = "Basic " + base64.b64encode(b"me:secret").decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == wanted
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", "2")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"ok")

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/a"
        for content, expected in (("", "forbidden"), ("machine 127.0.0.1 login me password secret\n", "")):
            (tmp_path / "netrc").write_text(content)
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            remote._opened.cache_clear()
            if expected:
                with pytest.raises(remote.Unreadable, match=expected):
                    remote.read(address, limit=9)
            else:
                assert remote.read(address, limit=9) == b"ok"
        server.shutdown()
    remote._opened.cache_clear()
