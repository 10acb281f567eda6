"""What tests share: shape checking, small real data, a Ray of their own."""

import gc
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parent.parent

# Before anything of darkmatter is imported: shapes in public signatures are checked under pytest, and only there.
install_import_hook("darkmatter", "shape_checks.check")

# Tests never attach to a cluster or a registry that happens to run here.
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
os.environ["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"] = "2"  # of a worker that is stopped; thirty by default
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a run of seconds should not wait two for its end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: processes that share the files end at about the same time then."""
    slow = ("tests/pipelines/", "tests/training/test_faults.py", "tests/training/test_loop.py")
    items.sort(key=lambda item: not item.nodeid.startswith(slow))


@pytest.fixture(autouse=True)
def no_registry() -> Iterator[None]:
    """`mlflow.set_tracking_uri` writes into the environment, where the next test would find it, or what a module shares."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this test run, ended by its own handle."""
    from darkmatter import cluster

    with cluster.session():
        yield
    # Ray forgets the handles of its processes while some still end, which Python warns of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A folder with data/shards and data/train made of 600 of the built-in digits by the real stages."""
    return make_digits(tmp_path_factory.mktemp("digits"), every=8)


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """To write below: in a folder of this machine, or on a server that speaks S3."""
    import s3
    from darkmatter import remote

    if request.param == "folder":
        yield str(tmp_path / "run")
        return
    (tmp_path / "bucket").mkdir()
    with s3.server(tmp_path, remembers="1m") as port:
        s3.use(monkeypatch, port)
        yield "s3://bucket/runs/run"
        remote._opened.cache_clear()


def make_digits(root: Path, *, every: int) -> Path:
    """Each `every`-th of the 5,000 built-in digits, as files in a folder a class, through the real stages."""
    from darkmatter import ingest, sources, training_set
    from darkmatter.sources import builtin

    source = builtin.open_source("mnist")
    items = list(source.items())[::every]
    for item, content in zip(items, source.read(items, limit=10_000), strict=True):
        path = root / "files" / str(item.label) / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    section = sources.SourceConfig(uri=f"folder:{root}/files", labels=True)
    ingest.ingest(section, ingest_config(samples_per_shard=128), out=root / "shards")
    training_set.build(root / "shards", augment_config(), root / "train")
    return root


def ingest_config(**changes: object) -> "ingest.IngestConfig":  # type: ignore[name-defined]
    from darkmatter import ingest

    values = {
        "samples_per_shard": 10, "val_fraction": 0.2, "test_fraction": 0.25, "max_pixels": 10_000, "max_file_mebibytes": 1,
        "max_decode_seconds": 10, "max_decode_mebibytes": 2048, "near_duplicates": -1, "drop_removed": False,
    }  # fmt: skip
    return ingest.IngestConfig(**{**values, **changes})


def augment_config(**changes: object) -> "training_set.AugmentConfig":  # type: ignore[name-defined]
    from darkmatter import training_set

    values = {"image_size": 28, "channels": 1, "max_side": 28, "encoding": "png", "views": {"name": "glyphs"}}
    return training_set.AugmentConfig(**{**values, **changes})


def copy_repository(folder: Path, *, results: bool = False) -> None:
    """This repository's files as they are, committed or not; `results` are dvc.lock and metrics."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, answer.split("\0")):
        if (ROOT / name).is_file() and (results or not name.startswith(("metrics/", "dvc.lock"))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def script(path: str) -> ModuleType:
    """A script of this repository, which is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
