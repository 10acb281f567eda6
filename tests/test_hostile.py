"""The corpus that nobody here wrote: all images of Pillow's own tests, crashes of its fuzzers and bombs among them."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL
import pytest

from conftest import ingest_config
from darkmatter import images, ingest, shards, sources


@pytest.fixture(scope="module")
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder Tests/images of the installed Pillow's source, downloaded once (47 MB) into pytest's cache."""
    cache = Path(request.config.cache.mkdir("pillow"))  # type: ignore[union-attr]
    archive = cache / f"pillow-{PIL.__version__}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", str(cache), f"pillow=={PIL.__version__}"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"the source of Pillow cannot be downloaded: {done.stderr[-500:]}")
    root = tmp_path_factory.mktemp("corpus")
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if "/Tests/images/" in member.name]
        tar.extractall(root, wanted, filter="data")
    return root / f"pillow-{PIL.__version__}" / "Tests" / "images"


def test_every_file_of_the_corpus_ends_as_a_sample_or_a_named_reject(
    corpus: Path, tmp_path: Path, ray_session: None
) -> None:
    config = ingest_config(
        samples_per_shard=256, max_pixels=64_000_000, max_file_mebibytes=64, max_decode_mebibytes=1024
    )
    section = sources.SourceConfig(uri=f"folder:{corpus}", labels=False)
    counts = ingest.ingest(section, config, out=tmp_path / "out")
    there = sum(len(names) for _, _, names in os.walk(corpus))
    assert there > 1000
    assert counts["files_seen"] == there == counts["samples"] + counts["duplicates"] + counts["rejects"]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rejects} <= {"not-an-image", "damaged", "too-many-pixels", "empty"}
    reasons = {row["name"]: row["reason"] for row in rejects}
    assert reasons["decompression_bomb.gif"] == "too-many-pixels"
    assert reasons["truncated_jpeg.jpg"] == "damaged"
    assert not any(name.startswith("hopper.") and name.endswith((".jpg", ".png", ".gif", ".bmp")) for name in reasons)
    manifest = shards.Manifest.load(tmp_path / "out")
    manifest.verify(tmp_path / "out")
    for shard in manifest.shards:  # what ingest let through can be decoded once more
        for sample in shards.read_shard(tmp_path / "out", shard):
            assert images.decode(sample.content).size


def test_memory_stays_under_its_limit_for_the_whole_corpus(corpus: Path) -> None:
    script = (
        "import sys, resource, pathlib; from darkmatter import images; from darkmatter.guard import Guard, Limits\n"
        "g = Guard(Limits(64_000_000, 20.0, 1024))\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).rglob('*')):\n"
        "    if path.is_file():\n"
        "        try: g.inspect(path.read_bytes())\n"
        "        except images.Rejected: pass\n"
        "g.close(); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(corpus)], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) < 1024 * 1024  # KiB
