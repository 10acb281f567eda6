"""Features of real digits by a small real network, through a real Ray."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from darkmatter import changes, cluster, contenders, features, health, images, model, shards, training_set
from darkmatter.changes import Change
from darkmatter.features import Extraction, Wanted

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests


@pytest.fixture(scope="module")
def network(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "model"
    spec = model.ModelSpec(
        backbone={"name": "small_conv", "small_conv": {"width": 8}},
        objective={"name": "vicreg", "vicreg": {"projector": [16, 16]}},
        views={"name": "glyphs"},
        images=training_set.load_image_spec(digits / "train"),
        num_samples=100,
    )
    model.save(folder, model.build(spec, seed=3), spec, {"seed": 5})
    return folder


def extraction(digits: Path, network: Path, cache: object) -> Extraction:
    _, spec, _ = model.load(network)
    return Extraction(folder=digits / "shards", spec=spec, seed=0, cache=str(cache), gpu=False)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each call ran."""
    ran: list[int] = []
    original = cluster.map_tasks

    def count(function: Any, tasks: Any, *words: Any, **options: Any) -> Any:
        ran.append(len(tasks))
        return original(function, tasks, *words, **options)

    monkeypatch.setattr(cluster, "map_tasks", count)
    return ran


def test_features_are_the_networks_in_the_order_of_the_shards(digits: Path, network: Path, address: str) -> None:
    one = extraction(digits, network, address)
    trained = Wanted(contenders.Network("pretrained", network))
    before = Wanted(contenders.Network("untrained", network, trained=False))
    found = one.arrays("test", [trained, before, Wanted(contenders.Pixels())])
    objective, spec, _ = model.load(network)
    with shards.Reader(digits / "shards", one.manifest, "test") as reader:
        contents = [reader.read(number) for number in range(len(reader))]
        assert (one.labels("test") == reader.labels).all()
    pictures = np.stack([images.fit(images.decode(content), size=28, channels=1) for content in contents])
    batch = torch.from_numpy(pictures).float() / 255
    assert found[trained] == pytest.approx(health.embeddings(objective, batch).numpy(), abs=1e-5)
    untrained = model.build(spec, seed=5)
    assert found[before] == pytest.approx(health.embeddings(untrained, batch).numpy(), abs=1e-5)
    assert (found[Wanted(contenders.Pixels())] == pictures.reshape(len(pictures), -1) / np.float32(255)).all()


def test_what_was_computed_is_kept_and_an_interrupted_extraction_goes_on(
    digits: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    monkeypatch.setattr(features, "_PART", 40)
    one = extraction(digits, network, tmp_path)
    wanted = [Wanted(contenders.Network("pretrained", network)), Wanted(contenders.Histogram())]
    ran = counted(monkeypatch)
    write = features.remote.write

    def killed(address: str, content: bytes) -> None:
        write(address, content)
        if len(list(tmp_path.glob("*/*.npy"))) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(features.remote, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        one.arrays("test", wanted)
    monkeypatch.setattr(features.remote, "write", write)
    first = one.arrays("test", wanted)
    again = one.arrays("test", wanted)
    assert ran[0] > 3
    assert ran[1:] == [ran[0] - 1, 0]  # one part was whole, of one only half
    assert all((first[key] == again[key]).all() for key in wanted)


def test_only_new_shards_are_embedded_and_other_weights_are_embedded_anew(
    digits: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    one = extraction(digits, network, tmp_path)
    whole = one.manifest.shards
    fewer = dataclasses.replace(one.manifest, shards=[shard for shard in whole if shard.split == "train"][:-1])
    grown = Path(tmp_path / "shards")
    grown.mkdir()
    for shard in whole:
        for name in shard.files:
            (grown / name).symlink_to(digits / "shards" / name)
    fewer.save(grown)
    wanted = [Wanted(contenders.Network("pretrained", network))]
    ran = counted(monkeypatch)
    dataclasses.replace(one, folder=grown).arrays("train", wanted)
    one.manifest.save(grown)
    dataclasses.replace(one, folder=grown).arrays("train", wanted)
    assert ran == [len(fewer.shards), 1]
    other = tmp_path / "other"
    _, spec, _ = model.load(network)
    model.save(other, model.build(spec, seed=4), spec, {"seed": 5})
    dataclasses.replace(one, folder=grown).arrays("train", [Wanted(contenders.Network("pretrained", other))])
    assert ran[2] == len(fewer.shards) + 1


def test_energies_views_and_patches_of_a_network(
    digits: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    one = extraction(digits, network, tmp_path)
    subject, paste = contenders.Network("pretrained", network), Change("paste")
    kinds = [Wanted(subject, "energies"), Wanted(subject, "views"), Wanted(subject, "similarity", paste)]
    energies, views, similarity = one.arrays("test", kinds).values()
    count = one.manifest.samples("test")
    objective, _, _ = model.load(network)
    assert energies.shape == (count, 2)
    assert views.shape == (count, features.VIEWS, objective.backbone.num_features)
    grid = objective.backbone.grid
    assert similarity.shape == (count, grid, grid)
    assert similarity.max() <= 1 + 1e-5
    middle = (changes.pasted_at(np.arange(count), seed=0) * grid).astype(int)
    assert similarity[np.arange(count), middle[:, 0], middle[:, 1]] == pytest.approx(np.ones(count), abs=1e-5)
    # The second number is of another sample: were it the same one, the two would be alike in distribution.
    assert np.mean(energies[:, 0] < energies[:, 1]) > 0.55
    partners = features._partners(0, count)
    assert sorted(partners) == list(range(count))
    assert (partners != np.arange(count)).all()
    # In parts of another size the same numbers: what is drawn follows the sample.
    monkeypatch.setattr(features, "_PART", 50)
    again = dataclasses.replace(one, cache=str(tmp_path / "again")).arrays("test", kinds)
    for key, expected in zip(kinds, (energies, views, similarity), strict=True):
        assert again[key] == pytest.approx(expected, abs=1e-4)


def test_changed_pictures_reach_those_who_read_files_as_well(
    digits: Path, network: Path, tmp_path: Path, ray_session: None
) -> None:
    one = extraction(digits, network, tmp_path)
    noise = Change("noise", 4)
    pixels, files = Wanted(contenders.Pixels(), "features", noise), Wanted(FromFiles(), "features", noise)
    found = one.arrays("test", [pixels, files])
    assert (found[pixels] == found[files]).all()
    assert (found[pixels] != one.arrays("test", [Wanted(contenders.Pixels())])[Wanted(contenders.Pixels())]).any()


@dataclasses.dataclass(frozen=True)
class FromFiles:
    """Pixels, by way of image files."""

    name: str = "files"
    digest: str = "files"

    def open(self, device: torch.device) -> "FromFiles":
        return self

    def embed(self, pictures: np.ndarray, contents: list[bytes]) -> np.ndarray:
        rows = [images.fit(images.decode(content), size=28, channels=1).ravel() for content in contents]
        return np.stack(rows).astype(np.float32) / 255


def test_an_empty_split_is_named(digits: Path, network: Path, tmp_path: Path) -> None:
    one = extraction(digits, network, tmp_path)
    train = dataclasses.replace(one.manifest, shards=[shard for shard in one.manifest.shards if shard.split == "train"])
    train.save(tmp_path)
    for shard in train.shards:
        for name in shard.files:
            (tmp_path / name).symlink_to(digits / "shards" / name)
    with pytest.raises(ValueError, match=r"the test split is empty; raise ingest\.test_fraction"):
        dataclasses.replace(one, folder=tmp_path).arrays("test", [])


def test_shards_that_changed_while_features_are_computed_are_refused(digits: Path, network: Path) -> None:
    one = extraction(digits, network, "unused")
    with pytest.raises(ValueError, match="has changed since evaluation began"):
        features._reader(one.folder, "the digest of another manifest", "test")
