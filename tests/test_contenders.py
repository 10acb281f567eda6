from pathlib import Path

import numpy as np
import pytest
import torch

from darkmatter import contenders, model
from test_features import network as network

CPU = torch.device("cpu")


def test_a_histogram_counts_colours_jointly() -> None:
    pictures = np.zeros((2, 3, 4, 4), np.uint8)
    pictures[1, 0] = 255
    pictures[1, 1, :2] = 128
    found = contenders.Histogram().open(CPU).embed(pictures, [])
    assert found.shape == (2, 512)
    assert np.square(found).sum(1) == pytest.approx([1, 1])
    assert found[0, 0] == 1
    assert {7 * 64 + 4 * 8, 7 * 64} == set(np.flatnonzero(found[1]))


def test_a_digest_follows_what_decides_the_features(network: Path, tmp_path: Path) -> None:
    one = contenders.Network("pretrained", network)
    assert one.digest == contenders.Network("another name", network).digest
    assert one.digest != contenders.Network("pretrained", network, trained=False).digest
    objective, spec, provenance = model.load(network)
    with torch.no_grad():
        next(objective.parameters())[0] += 1
    model.save(tmp_path / "other", objective, spec, provenance)
    assert one.digest != contenders.Network("pretrained", tmp_path / "other").digest


def test_what_stands_beside_is_a_folder_or_a_network_of_timm(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec, _ = model.load(network)
    assert contenders.beside(str(network), spec.images) == contenders.Network(str(network), network.resolve())
    larger = spec.images.model_copy(update={"image_size": 32})
    with pytest.raises(ValueError, match=r"evaluate\.beside: the model in .* takes 1 x 28 pixels, this one 1 x 32"):
        contenders.beside(str(network), larger)
    unknown = contenders.beside("no_such_network", spec.images)
    with pytest.raises(ValueError, match=r"evaluate\.beside: timm cannot give 'no_such_network'"):
        unknown.open(CPU)


def test_a_network_of_timm_prepares_images_as_its_weights_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights need a network to fetch; here it has random ones."""
    import io

    import timm
    from PIL import Image

    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, num_classes: create(name, num_classes=num_classes)
    )
    file = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 20, 90)).save(file, "PNG")
    opened = contenders.Timm("test_vit.r160_in1k").open(CPU)
    found = opened.embed(np.zeros((1, 3, 8, 8), np.uint8), [file.getvalue()])
    colour = torch.tensor([200, 20, 90]) / 255
    data = opened.data
    plain = ((colour - torch.tensor(data["mean"])) / torch.tensor(data["std"])).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = opened.network(plain.expand(1, *data["input_size"]))
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
