# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "mlflow==3.17.2", "torch>=2.11", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg",  # of every version
#   "timm>=1.0.31", "safetensors", "scipy",
# ]
# ///
"""Trains the champion further on a few labels, in a loop of plain torch: `python examples/fine_tune.py LABELLED`.

LABELLED has a folder of images for each class; so many of each as `--shots` says are learned from, the rest tells the
accuracy. Beside it stand the same network trained from nothing on the same images, and the pretrained one of which only
the last layer is trained; each for several draws of the images, with the interval of the mean (Student's t, 95%) and of the
differences, which are paired. The network of the first draw is written to `--out`, in the layout of `hub/`.

The network comes from the folder `hub/` of the version through timm. One that timm does not have brings its code along.
"""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from version import CHAMPION, Stop, Version, open_version, pictures, run, tell


def network(hub: Path, num_classes: int, *, pretrained: bool) -> nn.Module:
    """timm's, with a fresh last layer."""
    if (hub / "network.py").is_file():  # timm does not have it until this is imported
        sys.path.append(str(hub))
        importlib.import_module("network")
    return timm.create_model(f"local-dir:{hub}", pretrained=pretrained, num_classes=num_classes)


def read(version: Version, folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Every usable image as the network sees it, (N, C, S, S), its class, (N,), and the names of the classes."""
    hub = json.loads((version.folder / "artifacts/version/hub/config.json").read_text())["pretrained_cfg"]
    (channels, size, _), mean, std = hub["input_size"], torch.tensor(hub["mean"]), torch.tensor(hub["std"])
    code: dict = {"__name__": "images"}
    exec((version.folder / "artifacts/version/images.py").read_text(), code)  # of the version, which was verified
    images, labels, rejects = [], [], {}
    for path in pictures(folder):
        if len(path.relative_to(folder).parts) < 2:
            raise Stop(f"{path} is in no folder of a class")
        try:
            images.append(code["fit"](code["decode"](path.read_bytes()), size=size, channels=channels))
        except code["Rejected"] as error:
            rejects[path] = str(error)
            continue
        labels.append(path.relative_to(folder).parts[0])
    tell(rejects)
    names = sorted(set(labels))
    pixels = torch.from_numpy(np.array(images)).float() / 255
    return (
        (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1),
        torch.tensor([names.index(one) for one in labels]),
        names,
    )


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by up to `most` pixels each way: all that is done against learning fifty images by heart."""
    size = images.shape[-1]
    wide = F.pad(images, (most, most, most, most), mode="replicate")
    places = torch.randint(0, 2 * most + 1, (len(images), 2)).tolist()
    return torch.stack([one[:, y : y + size, x : x + size] for one, (y, x) in zip(wide, places, strict=True)])


def train(model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace, *, all_layers: bool) -> None:
    last = list(model.get_classifier().parameters())
    others = [one for one in model.parameters() if all(one is not other for other in last)]
    groups = [{"params": last, "lr": arguments.lr_last}]
    if all_layers:
        groups.append({"params": others, "lr": arguments.lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=arguments.steps
    )
    model.train(all_layers)  # the statistics of batch norm are the layers' too
    for _ in range(arguments.steps):
        chosen = torch.randint(0, len(images), (arguments.batch,))
        loss = F.cross_entropy(
            model(shifted(images[chosen], images.shape[-1] // 14)), labels[chosen], label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = [
            (model(some).argmax(1) == own).sum() for some, own in zip(images.split(256), labels.split(256), strict=True)
        ]
    return float(sum(right)) / len(labels)


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Whether each image is learned from: `shots` of each class."""
    random, chosen = np.random.default_rng(seed), torch.zeros(len(labels), dtype=torch.bool)
    for one in labels.unique():
        chosen[random.choice(np.flatnonzero(labels == one), shots, replace=False)] = True
    return chosen


def mean_interval(values: np.ndarray) -> str:
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{100 * values.mean():5.1f} ± {100 * half:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path, help="a folder of images for each class")
    parser.add_argument("--shots", type=int, default=5, help="images a class to learn from")
    parser.add_argument("--draws", type=int, default=5, help="of those images, and trainings of each kind")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of all layers but the last")
    parser.add_argument("--lr-last", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, default=Path("fine_tuned"), help="folder for the network of the first draw")
    parser.add_argument("--model", default=CHAMPION)
    arguments = parser.parse_args()
    if arguments.draws < 2 or arguments.shots < 1:
        raise Stop("--draws must be two at least, since one has no interval, and --shots one")
    pictures(arguments.labelled)  # before the model is loaded
    version = open_version(arguments.model)
    hub = version.folder / "artifacts/version/hub"
    images, labels, names = read(version, arguments.labelled)
    _check(arguments, labels, names)
    kinds = {  # (pretrained, all layers)
        "fine-tuned": (True, True), "last layer only": (True, False), "from nothing": (False, True),
    }  # fmt: skip
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in range(arguments.draws):
        known = draw(labels, arguments.shots, seed)
        for kind, (pretrained, all_layers) in kinds.items():
            torch.manual_seed(seed)
            model = network(hub, len(names), pretrained=pretrained)
            train(model, images[known], labels[known], arguments, all_layers=all_layers)
            found[kind].append(accuracy(model, images[~known], labels[~known]))
            if seed == 0 and kind == "fine-tuned":
                _save(model, arguments.out, hub, names)
    values = {kind: np.array(one) for kind, one in found.items()}
    print(
        f"{version}: {len(names)} classes of {arguments.shots} images, {arguments.draws} draws, "
        f"accuracy on the other {int((~known).sum())}"
    )
    for kind, value in values.items():
        print(f"  {kind:<16} {mean_interval(value)}")
    for kind in list(kinds)[1:]:
        print(f"  fine-tuned less {kind:<16} {mean_interval(values['fine-tuned'] - values[kind])}")
    print(f"{arguments.out}/: the fine-tuned network of the first draw, {found['fine-tuned'][0]:.1%}")


def _check(arguments: argparse.Namespace, labels: Tensor, names: list[str]) -> None:
    if len(names) < 2:
        raise Stop(f"{arguments.labelled} has {len(names)} classes with usable images; two are needed")
    counts = labels.bincount(minlength=len(names)).tolist()
    few = [f"{name} has {count}" for name, count in zip(names, counts, strict=True) if count <= arguments.shots]
    if few:
        raise Stop(
            f"{arguments.labelled}: more than {arguments.shots} usable images of each class are needed, so that some are "
            f"left to measure with, and {', '.join(few)}; add some, or say --shots {max(1, min(counts) - 1)}"
        )


def _save(model: nn.Module, out: Path, hub: Path, names: list[str]) -> None:
    """`timm.create_model("local-dir:OUT", pretrained=True)` loads it; `label_names` in its config.json are the classes."""
    timm.models.save_for_hf(model, str(out), model_config={"label_names": names}, safe_serialization=True)
    if (hub / "network.py").is_file():
        shutil.copyfile(hub / "network.py", out / "network.py")


if __name__ == "__main__":
    run(main)
