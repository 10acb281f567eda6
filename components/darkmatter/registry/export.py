"""The programs of a version: the network as graphs that need no code of ours, and how far they are from it on real images.

embedding.pt2    torch.export: images -> (features, mean of the patches' features)
embedding.onnx   the same
energy.pt2       torch.export: two images -> their energy
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from darkmatter.backbones import Backbone, Images
from darkmatter.model import ModelSpec
from darkmatter.objectives import Objective

#: The poolings of a version, in the order of the outputs of its programs.
POOLINGS = ("backbone", "patch_mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Between a program and the network, over the real images that it was checked on."""

    program: str
    largest: float
    """The largest absolute difference."""
    scale: float
    """The largest absolute number that the network gives."""

    def within(self, share: float) -> bool:
        """Whether it is at most that share of the scale; never, when a number is not finite."""
        return math.isfinite(self.scale) and self.largest <= share * self.scale


class Embedding(nn.Module):
    """What a backbone says of images, pooled in each way of POOLINGS: (B, D) by the backbone itself, (B, T) by the mean."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Images) -> tuple[Tensor, Tensor]:
        features, patches = self.backbone.both(images)
        return features, patches.mean(1)


class Energy(nn.Module):
    """The energy of an objective as a module of two batches of images."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Images, others: Images) -> Float[Tensor, " batch"]:
        return self.objective.energy(images, others)


def embedding(backbone: Backbone, spec: ModelSpec) -> torch.export.ExportedProgram:
    """(B, C, S, S) float32 in [0, 1] -> (B, D) and (B, T) float32, for any B."""
    return _export(Embedding(backbone), [_example(spec)])


def energy(objective: Objective, spec: ModelSpec) -> tuple[torch.export.ExportedProgram | None, int | None, str]:
    """Two (B, C, S, S) -> (B,).

    Returns:
        The program; how many pairs it takes at once, None for any number; and where there is no program, the reason.
    """
    module = Energy(objective)
    with torch.no_grad():
        module(_example(spec), _example(spec))  # what it draws once and keeps must not become a part of the program
    try:
        return _export(module, [_example(spec), _example(spec)]), None, ""
    except RuntimeError:  # some methods fix the number of pairs while they are traced (masks that are expanded)
        pass
    try:
        one = torch.zeros_like(_example(spec)[:1])
        return _export(module, [one, one.clone()], any_batch=False), 1, ""
    except RuntimeError as error:
        reason = f"torch.export cannot write the energy of {spec.objective['name']} as a program"
        return None, None, f"{reason} ({type(error).__name__})"


def write(
    folder: Path, objective: Objective, spec: ModelSpec, pictures: Images
) -> tuple[dict[str, Any], list[Difference]]:
    """Writes the programs into `folder` and compares each with the network.

    Args:
        folder: gets the programs.
        objective: the trained one, in eval mode, on the CPU.
        spec: what it was built from.
        pictures: real ones, at least two; as the network sees them at inference.

    Returns:
        What the code of a version must know of its programs, and the differences.
    """
    differences = _write_embedding(folder, objective.backbone, spec, pictures)
    program, at_once, reason = energy(objective, spec)
    if program is not None:
        torch.export.save(program, folder / "energy.pt2")
        pairs = (pictures, pictures.roll(1, 0))
        differences.append(_compare("energy.pt2", program.module(), Energy(objective), pairs, at_once))
    about = {"poolings": list(POOLINGS), "energy": program is not None, "pairs_at_once": at_once, "no_energy": reason}
    return about, differences


def _write_embedding(folder: Path, backbone: Backbone, spec: ModelSpec, pictures: Images) -> list[Difference]:
    import onnxruntime

    network, program = Embedding(backbone), embedding(backbone, spec)
    torch.export.save(program, folder / "embedding.pt2")
    onnx = torch.onnx.export(program, (), output_names=list(POOLINGS), dynamo=True, verbose=False)
    if onnx is None:
        raise RuntimeError("torch.onnx.export gave nothing")
    onnx.save(str(folder / "embedding.onnx"))
    session = onnxruntime.InferenceSession(folder / "embedding.onnx", providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())

    def run(images: Images) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(np.asarray(one)) for one in session.run(None, {name: images.numpy()}))

    return [
        _compare("embedding.pt2", program.module(), network, (pictures,)),
        _compare("embedding.onnx", run, network, (pictures,)),
    ]


def _export(module: nn.Module, examples: Sequence[Tensor], *, any_batch: bool = True) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in examples) if any_batch else None
    with torch.no_grad():
        return torch.export.export(module.eval(), tuple(examples), dynamic_shapes=shapes)


def _example(spec: ModelSpec) -> Tensor:
    size = spec.images.image_size
    return torch.zeros(2, spec.images.channels, size, size)  # a batch of one would fix the batch size at one


def _compare(
    program: str,
    run: Callable[..., Any],
    network: nn.Module,
    inputs: Sequence[Tensor],
    at_once: int | None = None,
) -> Difference:
    """In batches of one, two and all: a program that fixed its batch size would fail here."""
    largest = scale = 0.0
    with torch.no_grad():
        for size in sorted({1, 2, len(inputs[0])} if at_once is None else {at_once}):
            for start in range(0, len(inputs[0]) - size + 1, size):
                batch = [one[start : start + size] for one in inputs]
                for ours, theirs in zip(_several(run(*batch)), _several(network(*batch)), strict=True):
                    largest = _larger(largest, (ours - theirs).abs().max())
                    scale = _larger(scale, theirs.abs().max())
    return Difference(program=program, largest=largest, scale=scale)


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _larger(before: float, now: Tensor) -> float:
    """The larger of two, and NaN once there was one."""
    return float(torch.maximum(torch.tensor(before, dtype=torch.float64), now.double()))
