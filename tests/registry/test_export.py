"""The programs of a version are the network, for any batch and every family of backbones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import trained
from torch import Tensor, nn

from darkmatter import model, plugin
from darkmatter.objectives import Objective
from darkmatter.registry import card, export, hub

BACKBONES = [
    {"name": "small_conv", "small_conv": {"width": 4}},
    *({"name": "timm", "timm": {"model": name}} for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto")),
]


def spec_of(folder: Path, backbone: dict) -> model.ModelSpec:
    spec = trained.save(folder).model_copy(update={"backbone": backbone})
    return spec.model_copy(update={"images": spec.images.model_copy(update={"image_size": 32})})


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
def test_the_exported_program_is_the_network_for_any_batch(backbone: dict, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "m", backbone)
    network = model.build(spec, seed=0).backbone.eval()
    program = export.embedding(network, spec).module()
    for batch in (1, 2, 5):
        images = torch.rand(batch, 1, 32, 32)
        with torch.no_grad():
            features, patch_mean = program(images)
            torch.testing.assert_close(features, network(images), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(patch_mean, network.patches(images).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES[:1] + BACKBONES[2:3], ids=str)
def test_all_programs_are_written_and_compared_with_the_network(backbone: dict, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "m", backbone)
    objective = model.build(spec, seed=0).eval()
    about, differences = export.write(tmp_path, objective, spec, torch.rand(5, 1, 32, 32))
    assert about == {"poolings": ["backbone", "patch_mean"], "energy": True, "pairs_at_once": None, "no_energy": ""}
    assert [one.program for one in differences] == ["embedding.pt2", "embedding.onnx", "energy.pt2"]
    for one in differences:
        assert one.within(1e-4), one
        assert one.scale > 0
    session = onnxruntime.InferenceSession(tmp_path / "embedding.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["backbone", "patch_mean"]


def energy_program(name: str, folder: Path) -> tuple[export.Difference, int | None]:
    spec = trained.save(folder).model_copy(update={"objective": {"name": name}})
    objective = model.build(spec, seed=0).eval()
    program, at_once, reason = export.energy(objective, spec)
    assert program is not None, reason
    pictures = torch.rand(3, 1, 28, 28)
    pairs = (pictures, pictures.roll(1, 0))
    difference = export._compare(name, program.module(), export.Energy(objective), pairs, at_once)
    return difference, at_once


@pytest.mark.parametrize(("name", "at_once"), [("byol", None), ("mae", 1), ("cpc", 1)])
def test_a_program_of_an_energy_takes_any_number_of_pairs_or_else_one(
    name: str, at_once: int | None, tmp_path: Path
) -> None:
    difference, batch = energy_program(name, tmp_path / "m")
    assert batch == at_once
    assert difference.within(1e-4), "does it draw its masks at every call?"


class Branching(Objective):
    """Its energy asks a number for the way to go, which no graph can."""

    against_collapse = "contrastive"

    def energy(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).sum((1, 2, 3)) * (1.0 if float(x.mean()) > 0.5 else 2.0)

    def loss(self, views: Any, samples: Any) -> Any:
        raise NotImplementedError


def test_an_energy_that_no_program_can_hold_is_told_with_its_reason_and_on_the_card(tmp_path: Path) -> None:
    spec = trained.save(tmp_path / "m")
    objective = Branching(model.build(spec, seed=0).backbone).eval()
    about, differences = export.write(tmp_path, objective, spec, torch.rand(2, 1, 28, 28))
    assert (about["energy"], [one.program for one in differences]) == (False, ["embedding.pt2", "embedding.onnx"])
    assert about["no_energy"].startswith("torch.export cannot write the energy of simclr as a program (")
    lineage = {
        **trained.provenance(0), "git_commit": "c" * 40, "uncommitted": [], "weights_sha256": "w", "model_sha256": "m",
    }  # fmt: skip
    text = card.write(spec, trained.SCORES, lineage, about, differences, 32, trained.CONFIG)
    assert f"It gives no energy of pairs: {about['no_energy']}" in text


def test_a_program_that_differs_in_one_image_of_many_is_found() -> None:
    class Twice(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 2 * images.flatten(1)

    images = torch.rand(9, 1, 2, 2)

    def wrong(batch: Tensor) -> Tensor:
        result = 2 * batch.flatten(1)
        if len(batch) == 1 and torch.equal(batch[0], images[-1]):
            result[0, 0] += 0.5
        return result

    assert export._compare("p", Twice(), Twice(), (images,)).largest == 0
    assert export._compare("p", wrong, Twice(), (images,)).largest == pytest.approx(0.5, abs=1e-6)
    nothing = export._compare("p", lambda batch: wrong(batch) * float("nan"), Twice(), (images,))
    assert not nothing.within(1e9)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_loads_the_hub_folder_of_one_of_its_own(name: str, tmp_path: Path) -> None:
    import timm

    spec = spec_of(tmp_path / "m", {"name": "timm", "timm": {"model": name}})
    backbone = model.build(spec, seed=3).backbone.eval()
    hub.write(tmp_path / "hub", backbone, spec, "the card")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.13]
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(backbone.normalise(images)), backbone(images))
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


_WITHOUT_DARKMATTER = """
import sys
sys.modules["darkmatter"] = None  # importing it fails
sys.path.append(sys.argv[1])
import network, timm, torch
given = torch.load(sys.argv[2])
features = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
classes = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True, num_classes=7).eval()
fresh = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=False)
with torch.no_grad():
    torch.testing.assert_close(features(given["images"]), given["features"])
    maps = classes.forward_features(given["images"])
    torch.testing.assert_close(classes.forward_head(maps, pre_logits=True), given["features"])
    assert classes(given["images"]).shape == (2, 7)
    assert not torch.allclose(fresh.eval()(given["images"]), given["features"])
"""


def other_backbones() -> list[str]:
    return [name for name in plugin.names("backbones") if name != "timm"]


@pytest.mark.parametrize("name", other_backbones())
def test_timm_loads_the_hub_folder_of_every_other_backbone_by_the_code_in_it(name: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "m", {"name": name})
    backbone = model.build(spec, seed=3).backbone.eval()
    hub.write(tmp_path / "hub", backbone, spec, "the card")
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        given = {"images": backbone.normalise(images), "features": backbone(images)}
    torch.save(given, tmp_path / "given.pt")
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DARKMATTER, str(tmp_path / "hub"), str(tmp_path / "given.pt")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
