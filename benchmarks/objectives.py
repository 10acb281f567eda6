"""Every objective on the same backbone, samples and steps; beside nine of them lightly's own losses and heads.

    make bench-objectives      # an hour or two on two cores; rows go to docs/objectives.jsonl, `make docs` makes the tables

One process trains one method on one data set: for each seed ours and, where lightly has the method, a twin with lightly's
heads and loss. Both start from the same backbone weights, get the same views of the same samples, and take their steps in
turn, so that a noisy machine is noisy to both. Time per step is compared as the median of the ratios.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import in_process
from darkmatter import cluster, files, health, model, plugin, shards, training_set
from darkmatter.backbones import Backbone
from darkmatter.contenders import OpenNetwork
from darkmatter.evaluations import Score, Subject, few_shot, knn
from darkmatter.features import Extraction
from darkmatter.objectives import Objective
from darkmatter.parts import teacher
from darkmatter.stream import Stream
from darkmatter.training import memory, optimizers, rates

ROOT = Path(__file__).parent.parent
BATCH, LEARNING_RATE, HELD_OUT = 128, 0.004, 512
BASELINES = ("pixels", "untrained")

_PROTOTYPES = {
    "head": [256, 256, 8],
    "prototypes": 64,
    "momentum": 0.99,
    "teacher_temperature": 0.04,
    "centre_momentum": 0.5,
}
#: Widths for a backbone of 128 features, and momenta for runs of a few hundred steps; the rest is the papers'.
OPTIONS: dict[str, dict[str, Any]] = {
    "barlow_twins": {"projector": [256, 256, 256]},
    "bigan": {"latent": 32, "generator_width": 8, "discriminator_width": 8},
    "byol": {"projector": [256, 64], "predictor": 256, "momentum": 0.95},
    "cpc": {"patches": 6, "ignore": 1, "steps": 2, "features": 32, "context_width": 64, "context_depth": 2},
    "deepcluster": {"projector": [256, 64], "prototypes": [64, 64, 64]},
    "denoising": {"decoder_width": 16},
    "dino": _PROTOTYPES,
    "ibot": _PROTOTYPES,
    "ijepa": {"predictor_width": 64, "predictor_depth": 2, "momentum": 0.98},
    "lejepa": {"projector": [256, 64]},
    "mae": {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 4},
    "moco": {"projector": [256, 64], "queue": 2048, "momentum": 0.95},
    "npid": {"features": 64, "negatives": 0, "temperature": 0.1},
    "pirl": {"grid": 2, "features": 64, "negatives": 512, "temperature": 0.2, "momentum": 0.9},
    "simclr": {"projector": [256, 64], "temperature": 0.2},
    "simsiam": {"projector": [256, 256, 256], "predictor": 64},
    "swav": {"projector": [256, 64], "prototypes": 64},
    "vae": {"latent": 32, "decoder_width": 16},
    "vicreg": {"projector": [256, 256]},
    "vqvae": {"codes": 256, "features": 32},
}
#: The papers that reconstruct or predict use crops and mirror images only.
MILD = {
    "glyphs": {"max_shift": 0.05, "bend": 0.0, "max_degrees": 5.0, "max_shear": 0.05, "min_area": 0.9},
    "natural": {"min_area": 0.6, "jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": [0.0] * 3},
}
MILD_METHODS = ("bigan", "cpc", "denoising", "ijepa", "mae", "vae", "vqvae")
LOCAL = {"glyphs": {"local_min_area": 0.3}, "natural": {"local_min_area": 0.08}}
DATA = {
    "digits": {"image_size": 28, "channels": 1, "max_side": 28, "encoding": "png", "views": {"name": "glyphs"}},
    "clip art": {"image_size": 32, "channels": 3, "max_side": 48, "encoding": "png", "views": {"name": "natural"}},
}


@dataclasses.dataclass
class Runner:
    """One side of a comparison: an objective in training and the seconds of each of its steps."""

    objective: Any
    optimizer: torch.optim.Optimizer
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, views: Sequence[Tensor], samples: Tensor, *, step: int, total: int, seed: int) -> None:
        """What the loop does between two batches."""
        started = time.perf_counter()
        rate = rates.learning_rate(step, peak=LEARNING_RATE, warmup=total // 8, total=total)
        optimizers.set_rates(self.optimizer, rate, weight_decay=0.05)
        torch.manual_seed(seed + step)
        loss = self.objective(views, samples)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(step / total)
        self.seconds.append(time.perf_counter() - started)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{type(self.objective).__name__} diverged at step {step}")


def prepare(folder: Path, name: str, uri: str) -> None:
    """Shards, a training set, and for each split that scores are made of its pictures, decoded once for all methods."""
    if (folder / "test.npz").is_file():
        return
    with cluster.session():
        in_process.prepare(uri, folder, DATA[name], val=0.08, test=0.2)
    spec = specification("simclr", name, folder, width=1)
    kept = Extraction(folder=folder / "shards", spec=spec, seed=0, cache="", gpu=False)
    for split in ("train", "test"):
        labels = kept.labels(split)
        np.savez(folder / f"{split}.npz", pictures=kept.pictures(split, range(len(labels))), labels=labels)


def specification(name: str, data: str, folder: Path, width: int) -> model.ModelSpec:
    policy = DATA[data]["views"]["name"]
    options = MILD[policy] if name in MILD_METHODS else {}
    if plugin_class(name).takes_local_views:
        options = {**options, **LOCAL[policy], "local_views": 2}
    return in_process.specification(
        folder,
        {"name": name, name: OPTIONS.get(name, {})},
        {"name": policy, policy: options},
        {"name": "small_conv", "small_conv": {"width": width}},
    )


def plugin_class(name: str) -> type[Objective]:
    module = plugin.load("objectives", name, where="benchmark")
    found = [
        v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Objective) and v is not Objective
    ]
    return next(one for one in found if one.__module__ == module.__name__)


def learned(name: str, objective: Any, folder: Path) -> Subject:
    """What it makes of the pictures that `prepare` kept."""
    network = OpenNetwork(objective, torch.device("cpu"))
    train, test = (np.load(folder / f"{split}.npz") for split in ("train", "test"))
    bank, labels = network.embed(train["pictures"]), train["labels"]
    return Subject(
        name=name, bank=bank, bank_labels=labels, validation=bank[:0], validation_labels=labels[:0],
        queries=network.embed(test["pictures"]), query_labels=test["labels"],
    )  # fmt: skip


def scores(objective: Any, folder: Path, held_out: Sequence[Tensor]) -> dict[str, Any]:
    """As the stage `evaluate` scores a model."""
    subject = learned("it", objective, folder)
    shot_config = few_shot.Config(ways=[5], shots=[5], episodes=600, queries=15)
    shot = next(iter(few_shot.scores(shot_config, subject, seed=0)))
    neighbours = next(iter(knn.scores(knn.Config(neighbours=20, temperature=0.07), subject, seed=0)))
    if not isinstance(shot, Score) or not isinstance(neighbours, Score):
        raise ValueError(f"{folder} has too few labelled samples: {shot}, {neighbours}")
    result = {
        "few_shot": shot.mean,
        "few_shot_ci95": shot.ci95,
        "knn": neighbours.mean,
        "rankme": health.rankme(torch.from_numpy(subject.queries)),
    }
    if isinstance(objective, Objective):
        result["margin"] = health.auroc(*health.pair_energies(objective, held_out[0], held_out[1]))
    return result


def mebibytes(objective: nn.Module, views: Sequence[Tensor], samples: Tensor) -> float:
    """That a step of a fresh objective holds at its peak: weights, buffers, gradients, AdamW's two moments, and what the
    backward pass needs of the forward pass. Counted, not sampled: a process's resident size says more of its allocator."""
    held = memory.nbytes([*objective.parameters(), *objective.buffers()])
    trained = memory.nbytes(p for p in objective.parameters() if p.requires_grad)
    return (held + 3 * trained + memory.kept(objective, views, samples)) / 2**20


class Pixels(nn.Module):
    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def baseline(name: str, data: str, folder: Path, args: argparse.Namespace) -> None:
    """What a method has to beat: raw pixels, which no seed changes, and for each seed the backbone before training."""
    spec = specification("simclr", data, folder, args.width)
    for seed in range(1 if name == "pixels" else args.seeds):
        subject = Pixels() if name == "pixels" else Twin(build(spec, seed, vit=args.vit).backbone)
        row = {"data": data, "method": name, "side": "baseline", "seed": seed, "backbone": backbone_name(args)}
        print(json.dumps({**row, **scores(subject, folder, [])}), flush=True)


def backbone_name(args: argparse.Namespace) -> str:
    return "vit" if args.vit else "small_conv"


def measure(name: str, data: str, folder: Path, args: argparse.Namespace) -> None:
    """All seeds of one method; prints a row for each seed and side."""
    torch.set_num_threads(args.threads)
    spec = specification(name, data, folder, args.width)
    policy = training_set.choose_views(spec.views, spec.images)
    contents = training_set.held_out(folder / "train", HELD_OUT)
    held_out = policy(contents, np.arange(len(contents)), seed=0, epoch=-1)
    twin = LIGHTLY.get(name) if importlib.util.find_spec("lightly") else None
    if name == "mae" and not args.vit:
        twin = None  # lightly's needs a vision transformer: --vit compares on one
    for seed in range(args.seeds):
        sides = build_sides(spec, seed, twin, vit=args.vit)
        ours = sides["darkmatter"]
        runners = {side: Runner(one, optimizers.build(one)) for side, one in sides.items()}
        view_seconds, needed = [], {}
        with shards.Reader(folder / "train", shards.Manifest.load(folder / "train"), "train") as reader:
            load = functools.partial(policy.prepare, seed=seed, whole=ours.num_views)
            stream = Stream(reader, load, batch_size=BATCH, seed=seed)
            total = args.epochs * stream.steps_per_epoch
            for step, batch in enumerate(stream.batches(0, total)):
                started = time.perf_counter()
                views = policy.finish(batch.loaded, seed=seed, epoch=batch.epoch, whole=ours.num_views)
                view_seconds.append(time.perf_counter() - started)
                if not step:
                    fresh = build_sides(spec, seed, twin, vit=args.vit)
                    needed = {side: mebibytes(one, views, batch.loaded.samples) for side, one in fresh.items()}
                for runner in list(runners.values())[:: 1 if step % 2 else -1]:
                    runner.step(views, batch.loaded.samples, step=step, total=total, seed=seed)
        ratio = None
        if twin:
            pairs = zip(runners["darkmatter"].seconds, runners["lightly"].seconds, strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
        for side, runner in runners.items():
            seconds = statistics.median(runner.seconds) + statistics.median(view_seconds)
            row = {
                "data": data, "method": name, "side": side, "seed": seed, "steps": total,
                "backbone": backbone_name(args),
                "images_per_second": BATCH / seconds, "step_time_ratio": ratio if side == "darkmatter" else None,
                "memory_mib": needed[side],
                **scores(runner.objective, folder, held_out),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def build_sides(
    spec: model.ModelSpec, seed: int, twin: Callable[[Backbone, dict[str, Any]], "Twin"] | None, *, vit: bool
) -> dict[str, Any]:
    """Ours, and lightly's on a backbone of the same weights."""
    ours = build(spec, seed, vit=vit)
    if twin is None:
        return {"darkmatter": ours}
    torch.manual_seed(seed)
    backbone = build(spec, seed, vit=vit).get_submodule(student(ours))
    return {"darkmatter": ours, "lightly": twin(backbone, OPTIONS[spec.objective["name"]])}


def build(spec: model.ModelSpec, seed: int, *, vit: bool) -> Objective:
    if not vit:
        return model.build(spec, seed=seed)
    from timm.models.vision_transformer import VisionTransformer

    size, channels = spec.images.image_size, spec.images.channels
    torch.manual_seed(seed)
    network = VisionTransformer(
        img_size=size, patch_size=4, in_chans=channels, num_classes=0, embed_dim=64, depth=4, num_heads=4
    )
    backbone = Backbone(network, mean=spec.images.mean, std=spec.images.std, image_size=size)
    module, options = plugin.choose("objectives", spec.objective, where="objective")
    return module.build(options, backbone, spec.num_samples)


def student(objective: Objective) -> str:
    """Where the backbone in training is: beside a teacher that is exported it is another attribute."""
    return "backbone" if any(p.requires_grad for p in objective.backbone.parameters()) else "student"


class Twin(nn.Module):
    """A method as lightly's examples put it together, on our backbone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(True)

    def embed(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, views: Sequence[Tensor], samples: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(*views)}

    def after_step(self, progress: float) -> None:
        pass


class Pair(Twin):
    """Two views, one projector, one loss of the two projections."""

    def __init__(self, backbone: Backbone, head: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(backbone)
        self.head, self.criterion = head, loss

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.head(self.backbone(x)), self.head(self.backbone(y)))


def simclr(backbone: Backbone, options: dict[str, Any]) -> Twin:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    head = SimCLRProjectionHead(backbone.num_features, *options["projector"])
    return Pair(backbone, head, NTXentLoss(temperature=options["temperature"]))


def vicreg(backbone: Backbone, options: dict[str, Any]) -> Twin:
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    hidden, out = options["projector"]
    return Pair(backbone, VICRegProjectionHead(backbone.num_features, hidden, out, num_layers=2), VICRegLoss())


def barlow_twins(backbone: Backbone, options: dict[str, Any]) -> Twin:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    hidden, _, out = options["projector"]  # lightly's head has three layers
    return Pair(backbone, BarlowTwinsProjectionHead(backbone.num_features, hidden, out), BarlowTwinsLoss())


class Predicting(Twin):
    """BYOL and SimSiam: a predictor, and a target that no gradient reaches."""

    def __init__(self, backbone: Backbone, head: nn.Module, predictor: nn.Module, momentum: float | None) -> None:
        from lightly.loss import NegativeCosineSimilarity

        super().__init__(backbone)
        self.head, self.predictor, self.momentum = head, predictor, momentum
        self.criterion = NegativeCosineSimilarity()
        self.target = None if momentum is None else teacher.copy_of(nn.Sequential(backbone, head))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        projections = [self.head(self.backbone(view)) for view in (x, y)]
        predictions = [self.predictor(projection) for projection in projections]
        with torch.no_grad():
            targets = projections if self.target is None else [self.target(view) for view in (x, y)]
        first = self.criterion(predictions[0], targets[1].detach())
        return (first + self.criterion(predictions[1], targets[0].detach())) / 2

    def after_step(self, progress: float) -> None:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        if self.target is not None:
            momentum = cosine_schedule(round(progress * 1000), 1000, self.momentum, 1)
            update_momentum(self.backbone, self.target[0], momentum)
            update_momentum(self.head, self.target[1], momentum)


def byol(backbone: Backbone, options: dict[str, Any]) -> Twin:
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    hidden, out = options["projector"]
    head = BYOLProjectionHead(backbone.num_features, hidden, out)
    return Predicting(backbone, head, BYOLPredictionHead(out, options["predictor"], out), options["momentum"])


def simsiam(backbone: Backbone, options: dict[str, Any]) -> Twin:
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    hidden, out = options["projector"][0], options["projector"][-1]
    head = SimSiamProjectionHead(backbone.num_features, hidden, out)
    return Predicting(backbone, head, SimSiamPredictionHead(out, options["predictor"], out), None)


class MoCo(Twin):
    def __init__(self, backbone: Backbone, options: dict[str, Any]) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        super().__init__(backbone)
        hidden, out = options["projector"]
        self.head, self.momentum = MoCoProjectionHead(backbone.num_features, hidden, out), options["momentum"]
        self.keys = teacher.copy_of(nn.Sequential(backbone, self.head))
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(options["queue"], out))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        from lightly.models.utils import batch_shuffle, batch_unshuffle

        query = self.head(self.backbone(x))
        with torch.no_grad():
            shuffled, order = batch_shuffle(y)
            key = batch_unshuffle(self.keys(shuffled), order)
        return self.criterion(query, key)

    def after_step(self, progress: float) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.keys[0], self.momentum)
        update_momentum(self.head, self.keys[1], self.momentum)


class SwaV(Twin):
    def __init__(self, backbone: Backbone, options: dict[str, Any]) -> None:
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__(backbone)
        hidden, out = options["projector"]
        self.head = SwaVProjectionHead(backbone.num_features, hidden, out)
        self.prototypes, self.criterion = SwaVPrototypes(out, options["prototypes"]), SwaVLoss()

    def loss(self, *views: Tensor) -> Tensor:
        self.prototypes.normalize()
        projections = [F.normalize(self.head(self.backbone(view)), dim=1) for view in views]
        outputs = [self.prototypes(one) for one in projections]
        return self.criterion(outputs[:2], outputs[2:])


class DINO(Twin):
    def __init__(self, backbone: Backbone, options: dict[str, Any]) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        super().__init__(backbone)
        *hidden, bottleneck = options["head"]
        head = DINOProjectionHead(backbone.num_features, hidden[0], bottleneck, options["prototypes"])
        self.student = nn.Sequential(backbone, head)
        other = DINOProjectionHead(backbone.num_features, hidden[0], bottleneck, options["prototypes"])
        other.load_state_dict(head.state_dict())  # its weight normalisation cannot be copied
        self.teacher = nn.Sequential(teacher.copy_of(backbone), other.requires_grad_(False))
        self.momentum = options["momentum"]
        self.criterion = DINOLoss(
            output_dim=options["prototypes"],
            teacher_temp=options["teacher_temperature"],
            warmup_teacher_temp_epochs=1,
            center_momentum=options["centre_momentum"],
        )

    def embed(self, x: Tensor) -> Tensor:
        return self.teacher[0](x)

    def loss(self, *views: Tensor) -> Tensor:
        with torch.no_grad():
            targets = [self.teacher(view) for view in views[:2]]
        return self.criterion(targets, [self.student(view) for view in views], epoch=1)

    def after_step(self, progress: float) -> None:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        update_momentum(self.student, self.teacher, cosine_schedule(round(progress * 1000), 1000, self.momentum, 1))


class MAE(Twin):
    def __init__(self, backbone: Backbone, options: dict[str, Any]) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__(backbone)
        vit: Any = backbone.network
        self.masked = MaskedVisionTransformerTIMM(vit=vit)
        self.patch_size = vit.patch_embed.patch_size[0]
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, patch_size=self.patch_size, in_chans=backbone.channels,
            embed_dim=vit.embed_dim, decoder_embed_dim=options["decoder_width"],
            decoder_depth=options["decoder_depth"], decoder_num_heads=4,
        )  # fmt: skip

    def loss(self, x: Tensor) -> Tensor:
        from lightly.models import utils

        x, length = self.backbone.normalise(x), self.masked.sequence_length
        keep, hidden = utils.random_token_mask(size=(len(x), length), mask_ratio=0.75, device=x.device)
        encoded = self.decoder.embed(self.masked.encode(images=x, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(x), length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        patches = utils.patchify(x, self.patch_size)
        target = utils.get_at_index(patches, hidden - 1)  # without the class token
        return F.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))


LIGHTLY: dict[str, Callable[[Backbone, dict[str, Any]], Twin]] = {
    "simclr": simclr, "moco": MoCo, "byol": byol, "simsiam": simsiam, "barlow_twins": barlow_twins,
    "vicreg": vicreg, "swav": SwaV, "dino": DINO, "mae": MAE,
}  # fmt: skip


def replace(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows of a measurement in place of those of an earlier one of the same."""

    def what(row: dict[str, Any]) -> tuple[str, ...]:
        return row["data"], row["backbone"], row["method"]

    there = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [row for row in there if what(row) not in set(map(what, rows))]
    files.write(path, "".join(json.dumps(row) + "\n" for row in [*kept, *rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/benchmark"), help="folder for data and rows")
    parser.add_argument(
        "--rows",
        type=Path,
        default=ROOT / "docs" / "objectives.jsonl",
        help="file that takes the rows, in place of earlier ones of a method",
    )
    parser.add_argument("--data", action="append", help="name=uri, name one of: " + ", ".join(DATA))
    parser.add_argument(
        "--method", action="append", choices=[*BASELINES, *plugin.names("objectives")], help="default: all"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="of small_conv")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--vit", action="store_true", help="a small vision transformer in place of small_conv")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = dict(one.split("=", 1) for one in args.data or ["digits=builtin:mnist"])
    methods = args.method or [*BASELINES, *plugin.names("objectives")]
    if args.one:
        ((name, _),) = data.items()
        run = baseline if methods[0] in BASELINES else measure
        run(methods[0], name, args.work / name.replace(" ", "-"), args)
        return
    for name, uri in data.items():
        prepare(args.work / name.replace(" ", "-"), name, uri)
    pending = [(name, method) for name in data for method in methods]
    running: list[tuple[subprocess.Popen[str], str, str]] = []
    rows = args.rows
    while pending or running:
        while pending and len(running) < args.jobs:
            name, method = pending.pop(0)
            command = [sys.executable, "-W", "ignore", __file__, "--one", "--work", str(args.work), "--method", method]
            command += ["--data", f"{name}={data[name]}", "--epochs", str(args.epochs), "--seeds", str(args.seeds)]
            command += ["--width", str(args.width), "--threads", str(args.threads), *(["--vit"] if args.vit else [])]
            print(f"{method} on {name} ...", flush=True)
            running.append((subprocess.Popen(command, stdout=subprocess.PIPE, text=True), name, method))
        for entry in list(running):
            process, name, method = entry
            if process.poll() is not None:
                output = process.stdout.read() if process.stdout else ""
                if process.returncode:
                    print(f"{method} on {name} FAILED with {process.returncode}", flush=True)
                else:
                    replace(rows, [json.loads(line) for line in output.splitlines()])
                running.remove(entry)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
