"""Files that run code if a door is open, each put where a stranger could put it. None may run.

Each payload makes a file of its own (`ran`); `test_the_payloads_are_live` shows that they would. What comes in by
listing and reading goes through one real ingest, so that the decoders, the guarded process and Ray are in the way as in
life.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hostile import picture, special
from safetensors.torch import save_file

from conftest import ingest_config
from darkmatter import ingest, model, params, recipe, registry, remote, shards, sources
from darkmatter.guard import Guard, Limits
from darkmatter.images import Rejected
from darkmatter.params import ParamsError
from darkmatter.registry import seal
from darkmatter.training import history
from darkmatter.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.command = f"touch '{ran}'"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickled(ran: Path) -> bytes:
    return pickle.dumps(Bomb(ran), protocol=2)  # at others weights_only warns


def torch_file(ran: Path, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"step": 1, "objective": Bomb(ran)}, file, **options)
    return file.getvalue()


def numpy_file(ran: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb(ran)], dtype=object), allow_pickle=True)
    return file.getvalue()


def numpy_zip(ran: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.array([Bomb(ran)], dtype=object))
    return file.getvalue()


def yaml_text(ran: Path) -> str:
    return f"!!python/object/apply:os.system [\"touch '{ran}'\"]"


class Rooms:
    """Where payloads say that they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def __call__(self, name: str) -> Path:
        assert name not in self.names
        self.names.append(name)
        return self.folder / name.replace("/", "_")

    def ran(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def rooms(tmp_path: Path) -> Rooms:
    (tmp_path / "ran").mkdir()
    return Rooms(tmp_path / "ran")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_the_payloads_are_live(rooms: Rooms, tmp_path: Path) -> None:
    pickle.loads(pickled(rooms("pickle")))
    for name, options in (("torch", {}), ("torch-old", {"_use_new_zipfile_serialization": False})):
        torch.load(io.BytesIO(torch_file(rooms(name), **options)), weights_only=False)
    np.load(io.BytesIO(numpy_file(rooms("numpy"))), allow_pickle=True)
    np.load(io.BytesIO(numpy_zip(rooms("numpy-zip"))), allow_pickle=True)["a"]
    yaml.unsafe_load(yaml_text(rooms("yaml")))
    subprocess.run(["sh", "-c", f"touch '{rooms('shell')}'"])
    import webdataset

    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        add(file, "a.pyd", pickled(rooms("webdataset")))
    list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    assert rooms.ran() == sorted(rooms.names)


# --- what a source holds


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


#: Suffixes that webdataset 1.0.2, Ray Data or a careless reader decode by themselves.
SUFFIXES = (
    "pyd",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "npy",
    "npz",
    "meta.pyd",
    "cls",
    "json",
    "jpg",
    "cbor",
    "msgpack",
    "ten",
)


def tars(folder: Path, rooms: Rooms) -> str:
    contents: dict[str, Callable[[Path], bytes]] = {
        "pth": torch_file,
        "pt": torch_file,
        "npy": numpy_file,
        "npz": numpy_zip,
    }
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, suffix in enumerate(SUFFIXES):
            if suffix != "jpg":
                add(tar, f"{number:03}.png", picture(number))
            add(tar, f"{number:03}.{suffix}", contents.get(suffix, pickled)(rooms(f"tar {suffix}")))
        add(tar, "../../ran/tar traversal", b"x")
        add(tar, f"{rooms.folder}/tar absolute", b"x")
        add(tar, f"../../ran/{'a/' * 900}deep.png", picture(99))
        for name, kind, target in (
            ("link.png", tarfile.SYMTYPE, "/etc/passwd"), ("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
            ("pipe.png", tarfile.FIFOTYPE, ""), ("device.png", tarfile.CHRTYPE, ""),
        ):  # fmt: skip
            tar.addfile(special(name, kind, target))
        add(tar, "link.png/x.png", picture(98))
    return f"webdataset:{folder}"


def pictures(folder: Path, rooms: Rooms) -> str:
    folder.mkdir()
    (folder / "good.png").write_bytes(picture(1))
    vector = rooms("magick svg")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="|touch {vector}"/><script>x</script></svg>'
    (folder / "a.svg").write_text(svg)
    (folder / "b.png").write_text(svg)
    (folder / "c.eps").write_text(
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {rooms('eps')}) (w) file\n"
    )
    mvg = f"push graphic-context\nfill 'url(https://a\"|touch \"{rooms('mvg')})'\npop graphic-context\n"
    (folder / "d.jpg").write_text(mvg)
    (folder / "e.mvg").write_text(mvg)
    (folder / "f.pdf").write_text(f"%PDF-1.4\n1 0 obj <</OpenAction <</S /Launch /F (touch {rooms('pdf')})>>>>\n")
    (folder / "g.jpg").write_bytes(pickled(rooms("picture pickle")))
    (folder / "h.png").write_bytes(picture(2) + pickled(rooms("behind the end")))
    (folder / "i.pt").write_bytes(torch_file(rooms("folder torch")))
    (folder / f"$(touch {rooms('dollar').name}).png").write_bytes(picture(3))
    (folder / f";touch {rooms('semicolon').name};.png").write_bytes(picture(4))
    (folder / f"|touch {rooms('bar').name}").write_bytes(picture(5))
    (folder / "{{ x.__class__ }} <img src=x onerror=alert(1)>").mkdir()
    (folder / "{{ x.__class__ }} <img src=x onerror=alert(1)>" / "a.png").write_bytes(picture(6))
    return f"folder:{folder}"


def table(folder: Path, rooms: Rooms) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    contents = [picture(10), pickled(rooms("parquet cell")), torch_file(rooms("parquet torch"))]
    evil = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled(rooms("parquet type")),
    }
    fields = [pa.field("image", pa.binary()), pa.field("label", pa.binary(), metadata=evil)]
    labels = [b"a", pickled(rooms("parquet label")), b"c"]
    features = json.dumps({"info": {"features": {"label": {"names": [yaml_text(rooms("parquet names"))]}}}})
    schema = pa.schema(fields, metadata={"huggingface": features, b"pandas": pickled(rooms("parquet pandas"))})
    pq.write_table(pa.Table.from_arrays([pa.array(contents), pa.array(labels)], schema=schema), folder / "a.parquet")
    return f"parquet:{folder}"


def rows(folder: Path, rooms: Rooms) -> str:
    folder.mkdir()
    (folder / "good.png").write_bytes(picture(20))
    (folder / "evil.pkl").write_bytes(pickled(rooms("row pickle")))
    paths = [
        "good.png", "evil.pkl", f"pipe:touch {rooms('row pipe')}", f"pipe://touch {rooms('row pipe 2')}",
        f"|touch {rooms('row bar')}", f"file:touch {rooms('row file')}|", f"simplecache::file://{folder}/evil.pkl",
        f"reference::file://{folder}/evil.json", f"$(touch {rooms('row dollar')})", "../" * 30 + "dev/stdin", "/dev/zero",
        "python://os/system", "data:image/png;base64,AAAA", "\x00.png",
    ]  # fmt: skip
    template = f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{rooms('row template')}"
    (folder / "evil.json").write_text(json.dumps({"version": 1, "templates": {"u": template}, "refs": {}}))
    (folder / "list.jsonl").write_text("".join(json.dumps({"path": path, "label": "a"}) + "\n" for path in paths))
    return f"manifest:{folder}/list.jsonl"


@pytest.mark.parametrize("make", [tars, pictures, table, rows])
def test_nothing_that_a_source_holds_is_executed_or_written_elsewhere(
    make: Callable[[Path, Rooms], str], rooms: Rooms, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rooms.folder)
    section = sources.SourceConfig(uri=make(tmp_path / "source", rooms), labels=True)
    counts = ingest.ingest(section, ingest_config(), out=tmp_path / "out")
    assert rooms.ran() == [], "executed, or unpacked"
    assert counts["samples"] >= 1, "the good ones are there"
    for shard in shards.Manifest.load(tmp_path / "out").shards:
        for sample in shards.read_shard(tmp_path / "out", shard):
            assert sample.extension in ("png", "jpg")
            assert b"touch" not in sample.content, "a shard would carry it on"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ran", "source"]


@pytest.mark.parametrize(
    "address",
    [
        "pipe:touch {}", "webdataset:pipe:touch {}", "webdataset:pipe:touch {}; echo a.tar", "webdataset:|touch {}.tar",
        "folder:pipe:touch {}", "folder:$(touch {})", "manifest:pipe:touch {};.csv", "parquet:pipe:touch {}|.parquet",
        "webdataset:pipe://touch {}", "folder:python://touch {}", "os.system:touch {}", "../../evil:{}", "builtin:touch {}",
        "torchvision:__builtins__#root={}", "webdataset:simplecache::pipe:touch {}.tar", "folder:ssh://`touch {}`/x",
    ],
)  # fmt: skip
def test_no_address_of_a_source_is_a_command(address: str, rooms: Rooms) -> None:
    config = sources.SourceConfig(uri=address.format(rooms("address")), labels=True)
    with pytest.raises((ParamsError, remote.Unreadable)):
        sources.open_source(config).state()
    assert rooms.ran() == []


def test_a_list_from_elsewhere_names_no_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from darkmatter.sources.manifest import Manifest

    (tmp_path / "secret.png").write_bytes(picture(1))
    for path in (f"{tmp_path}/secret.png", f"file://{tmp_path}/secret.png", f"local://{tmp_path}/secret.png"):
        item = sources.Item("x", place=json.dumps(path))
        (answer,) = Manifest("https://example.invalid/list.jsonl").read([item], limit=10_000)
        assert isinstance(answer, remote.Unreadable)
        assert answer.reason == "outside"
        (answer,) = Manifest(f"{tmp_path}/list.jsonl").read([item], limit=10_000)
        assert isinstance(answer, bytes), "a list of this machine may"


@pytest.mark.parametrize(
    "answer",
    [
        b'{"extension": "../../evil", "fingerprint": 1}', b'{"extension": "png", "fingerprint": "x"}',
        b'{"extension": "png"}', b'{"reason": "<b>", "detail": "x"}', b"[" * 50_000, b"x" * 70_000, pickle.dumps(1), b"null",
        b'{"extension": "png", "fingerprint": 99999999999999999999}',
    ],
)  # fmt: skip
def test_a_decoder_that_was_taken_over_can_say_yes_or_no_and_nothing_else(answer: bytes) -> None:
    script = (
        "import socket, struct, sys\nwith socket.socket(fileno=0) as line:\n    line.sendall(b'!')\n    line.recv(1 << 16)\n"
        f"    reply = {answer!r}\n    line.sendall(struct.pack('>Q', len(reply)) + reply)\n    line.recv(1)\n"
    )
    import socket

    guard = Guard(Limits(10_000, 10.0, 1024))
    ours, theirs = socket.socketpair()
    with theirs:
        guard._process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs.fileno())
    ours.settimeout(20)
    assert ours.recv(1) == b"!"
    guard._line = ours
    with pytest.raises(Rejected, match="killed-the-decoder"):
        guard.inspect(picture(1))
    assert guard._process is None, "it is not asked again"


# --- what a store of checkpoints holds


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive:UserWarning")
@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "script"])
def test_a_checkpoint_that_somebody_else_wrote_is_not_executed_and_the_one_before_it_serves(
    kind: str, rooms: Rooms, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(str(tmp_path / "run"), keep=3)
    for step in (10, 20):
        checkpoints.save(step, {"step": step, "objective": {"w": torch.ones(3)}})
    place = tmp_path / "run" / "step-0000020"
    if kind == "script":
        with pytest.warns(FutureWarning, match="deprecated"):
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), place / "state.pt")
    else:
        old = {"_use_new_zipfile_serialization": False} if kind == "old" else {}
        ran = rooms("checkpoint")
        (place / "state.pt").write_bytes(pickled(ran) if kind == "pickle" else torch_file(ran, **old))
    about = json.loads((place / "checkpoint.json").read_text())
    about["sha256"]["state.pt"] = hashlib.sha256((place / "state.pt").read_bytes()).hexdigest()
    (place / "checkpoint.json").write_text(json.dumps(about))
    state = checkpoints.load_newest()
    assert rooms.ran() == []
    assert state is not None
    assert state["step"] == 10
    assert "something else than tensors and numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"step": NaN}', '{"step": 1e999}', yaml_text(Path("x")), "{", "\x00"],
)
def test_json_beside_checkpoints_is_data(content: str, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(content + "\n")
    with contextlib.suppress(ValueError, RecursionError):
        history.read_all(str(tmp_path))
    checkpoints = Checkpoints(str(tmp_path / "run"), keep=3)
    checkpoints.save(10, {"step": 10})
    checkpoints.save(20, {"step": 20})
    (tmp_path / "run" / "step-0000020" / "checkpoint.json").write_text(content)
    state = checkpoints.load_newest()
    assert state == {"step": 10}


# --- what a model folder holds


def model_folder(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    import trained

    trained.save(tmp_path / "model")
    return tmp_path / "model", json.loads((tmp_path / "model" / "config.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"_target_": "os.system", "_args_": ["touch {}"]},
        {"backbone": {"_target_": "os.system", "command": "touch {}"}},
        {"backbone": {"name": "os.system"}},
        {"backbone": {"name": "../../evil"}},
        {"backbone": {"name": "evil"}},
        {"objective": {"name": "simclr", "simclr": {"projector": {"_target_": "os.system"}}}},
        {"objective": {"name": "__init__"}},
        {"backbone": {"name": "timm", "timm": {"model": "hf-hub:evil/model"}}},
        {"backbone": {"name": "timm", "timm": {"model": "local-dir:evil"}}},
        {"images": {"image_size": "__import__('os').system('touch {}')"}},
        {"format": {"__reduce__": "os.system"}},
    ],
)
def test_a_model_folder_names_no_code(
    change: dict[str, Any], rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tree = model_folder(tmp_path)
    ran = rooms("model")
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (folder / "config.json").write_text(json.dumps(tree | change).replace("{}", str(ran)))
    if set(change) == {"_target_", "_args_"}:
        model.load(folder)  # keys that nobody reads
    else:
        with pytest.raises(ValueError):  # noqa: PT011  # whichever: it is named
            model.load(folder)
    assert rooms.ran() == []


def test_weights_are_no_pickle_and_no_bomb(rooms: Rooms, tmp_path: Path) -> None:
    folder, _ = model_folder(tmp_path)
    path = folder / "backbone.safetensors"
    good = path.read_bytes()
    nested = b'{"a":' + b"[" * 50_000
    for content in (
        pickled(rooms("weights")),
        torch_file(rooms("weights torch")),
        (2**62).to_bytes(8, "little") + b"{}",
        (len(nested)).to_bytes(8, "little") + nested,
        good[:8] + good[8:200],
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99999999999999]}}',
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="do not fit its config"):
            model.load(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="no description of a model"):
        model.load(folder)
    assert rooms.ran() == []
    save_file({"x": torch.ones(1)}, path)


# --- what is set


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system [\"touch '{}'\"]", "name:os.system", "module:os", "object/new:os.x {{}}"]
)
def test_params_are_data(tag: str, rooms: Rooms, tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    for wrong in (
        f"!!python/{tag.format(rooms('whole'))}",
        text.replace("builtin:mnist  ", f"!!python/{tag.format('x')} #"),
    ):
        (tmp_path / "params.yaml").write_text(wrong)
        with pytest.raises(ParamsError, match="not valid YAML"):
            params.read(tmp_path / "params.yaml")
    assert rooms.ran() == []


@pytest.mark.parametrize("name", ["os.system", "../../evil", "evil", "__init__", "_draws", "simclr; touch x", "os", ""])
@pytest.mark.parametrize("section", ["objective", "backbone", "augment", "source", "evaluate"])
def test_a_name_in_params_is_a_file_of_its_folder_or_refused(
    section: str, name: str, rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(rooms('plugin'))!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = params.read(ROOT / "params.yaml")
    if section == "source":
        tree["source"]["uri"] = f"{name}:x"
    elif section == "evaluate":
        tree["evaluate"][name] = {}
    elif section == "augment":
        tree["augment"]["views"]["name"] = name
    else:
        tree[section]["name"] = name
    with pytest.raises(ParamsError, match="there is no"):
        recipe.check(tree)
    assert rooms.ran() == []


# --- what a registry holds


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an empty registry; a new database takes seconds."""
    folder, before = tmp_path_factory.mktemp("registry"), Path.cwd()
    os.chdir(folder)  # MLflow puts what it stores beside where it first was
    registry.connect(f"sqlite:///{folder}/mlflow.db")
    registry.find("x", alias="champion")
    os.chdir(before)
    return folder


def put(folder: Path, name: str, tags: dict[str, str]) -> None:
    """A folder as the champion of this name, as anyone who may write to MLflow can."""
    import mlflow

    client = mlflow.MlflowClient()
    with mlflow.start_run():
        logged = mlflow.initialize_logged_model(name="embedder")
        client.log_model_artifacts(logged.model_id, str(folder))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        made = mlflow.register_model(f"models:/{logged.model_id}", name, tags={"weights_sha256": "0" * 64, **tags})
    client.set_registered_model_alias(name, "champion", made.version)


_CODE = """
import mlflow
class Embedder(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]):
        return model_input
{more}
mlflow.models.set_model(Embedder())
"""


@pytest.mark.parametrize("kind", ["pickle", "sealed-pickle", "code-from-elsewhere", "changed-code"])
def test_a_version_that_others_put_into_the_registry_is_not_executed(
    kind: str, rooms: Rooms, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(store)
    registry.connect(f"sqlite:///{store}/mlflow.db")
    ran, folder = rooms("version"), tmp_path / "version"
    (tmp_path / "_embedder.py").write_text(_CODE.format(more=""))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "addition.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    options = {"code_paths": [str(tmp_path / "more")]} if kind == "code-from-elsewhere" else {}
    mlflow.pyfunc.save_model(str(folder), python_model=str(tmp_path / "_embedder.py"), pip_requirements=[], **options)
    if "pickle" in kind:
        tree = yaml.safe_load((folder / "MLmodel").read_text())
        ours = tree["flavors"]["python_function"]
        del ours["model_code_path"]
        ours |= {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl", "cloudpickle_version": "3"}
        (folder / "MLmodel").write_text(yaml.safe_dump(tree))
        (folder / "python_model.pkl").write_bytes(pickled(ran))
    put(folder, kind, {} if kind == "pickle" else {"seal_sha256": seal.write(folder)})
    if kind == "changed-code":
        registry.load(f"models:/{kind}@champion")
        for stored in (store / "mlruns").rglob("_embedder.py"):
            stored.write_text(_CODE.format(more=f"open({str(ran)!r}, 'w').close()"))
    with pytest.raises(ValueError, match=r"has no seal|no version of Darkmatter's|not what was registered"):
        registry.load(f"models:/{kind}@champion")
    champion = registry.champion(kind)
    if kind == "pickle":
        assert champion is None
    else:
        assert champion is not None
        with pytest.raises(seal.Broken):
            champion.open(torch.device("cpu"))
    assert rooms.ran() == []
    if kind in ("pickle", "changed-code"):  # the payload is live: MLflow's own loading runs it
        with contextlib.suppress(AttributeError):  # what it unpickles is an exit status, which is no model
            mlflow.pyfunc.load_model(f"models:/{kind}@champion")
        assert rooms.ran() == ["version"]
