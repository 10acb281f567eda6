"""Whether a faster engine of the views costs accuracy: few-shot accuracy of SimCLR by each, at an equal budget.

    python benchmarks/engines.py folder:/usr/share/openclipart/png     # labelled images; writes into docs/performance.md

The usual loader's views (Pillow and torchvision, `data.usual`) are one more engine. All see the same samples in the same
order from the same weights; episodes are the same for all. Differences are paired by the seed of the training, and their
interval is that of the seeds: two trainings by one engine differ more than episodes do.
"""

import argparse
import datetime
import functools
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

import objectives as bench
from darkmatter import model, shards, training_set
from darkmatter.evaluations import Score, few_shot
from darkmatter.stream import Stream
from darkmatter.training import optimizers, rates
from data import PAGE, replace_section, usual

BATCH, SIZE, RATE = 128, 48, 0.004
SHOTS = few_shot.Config(ways=[5], shots=[5], episodes=600, queries=15)


class Usual:
    """The usual loader's views, with the policy's defaults; draws from torch's and Python's global generators."""

    def __init__(self) -> None:
        scale = SIZE / 224  # the policy's widths of the blur are those of 224 pixels
        sigma = 0.1 * scale, 2.0 * scale
        self.transform = usual([0.4, 0.4, 0.4, 0.1], SIZE, (0.2, 1.0), 0.5, 0.0, blur_sigma=sigma, normalise=False)

    def prepare(self, contents: Sequence[bytes], samples: np.ndarray, *, epoch: int, **_: Any) -> list[Tensor]:
        pictures = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
        return [torch.stack([self.transform(picture) for picture in pictures]) for _ in range(2)]

    def finish(self, prepared: list[Tensor], **_: Any) -> list[Tensor]:
        return prepared


def train(folder: Path, engine: str, seed: int, epochs: int) -> np.ndarray:
    """The accuracy of each episode."""
    spec = bench.specification("simclr", "clip art", folder, width=1)
    options = {"name": "natural", "natural": {"engine": engine}}
    policy: Any = Usual() if engine == "A2" else training_set.choose_views(options, spec.images)
    objective = model.build(spec, seed=seed)
    optimizer = optimizers.build(objective)
    with shards.Reader(folder / "train", shards.Manifest.load(folder / "train"), "train") as reader:
        stream = Stream(reader, functools.partial(policy.prepare, seed=seed, whole=2), batch_size=BATCH, seed=seed)
        total = epochs * stream.steps_per_epoch
        for batch in stream.batches(0, total):
            optimizers.set_rates(
                optimizer, rates.learning_rate(batch.step, peak=RATE, warmup=total // 8, total=total), 0.05
            )
            torch.manual_seed(seed + batch.step)
            views = policy.finish(batch.loaded, seed=seed, epoch=batch.epoch, whole=2)
            objective(views, torch.arange(BATCH))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    score = next(iter(few_shot.scores(SHOTS, bench.learned(engine, objective, folder), seed=0)))
    if not isinstance(score, Score) or score.draws is None:
        raise ValueError(f"{folder} has too few labelled samples")
    return score.draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("uri", help="a source with labels")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    bench.DATA["clip art"] = {
        "image_size": SIZE,
        "channels": 3,
        "max_side": 72,
        "encoding": "jpeg",
        "views": {"name": "natural"},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench.prepare(folder, "clip art", arguments.uri)
        found: dict[str, list[np.ndarray]] = {}
        for seed in range(arguments.seeds):
            for engine in ("A2", "exact", "fast", "device"):
                found.setdefault(engine, []).append(train(folder, engine, seed, arguments.epochs))
                print(engine, seed, f"{found[engine][-1].mean():.4f}", flush=True)
        count = shards.Manifest.load(folder / "train").samples("train")
    lines = ["| engine | 5-way 5-shot, % | of each seed | less A2, paired |", "| --- | --- | --- | --- |"]
    for engine, draws in found.items():
        means = 100 * np.mean(draws, axis=1)
        less = means - 100 * np.mean(found["A2"], axis=1)
        within = stats.sem(less) * stats.t.ppf(0.975, len(less) - 1)
        beside = "" if engine == "A2" else f"{less.mean():+.2f} ± {within:.2f}"
        lines.append(f"| `{engine}` | {means.mean():.1f} | {', '.join(f'{mean:.1f}' for mean in means)} | {beside} |")
    about = (
        f"`benchmarks/engines.py`, {datetime.date.today()}: SimCLR, `small_conv`, {count:,} images of "
        f"{'/'.join(arguments.uri.split('/')[-2:])} at {SIZE} pixels, {arguments.epochs} epochs of batch {BATCH}; the same "
        f"weights, samples, episodes for all. The interval is that of {arguments.seeds} paired trainings (Student's t, 95%)."
    )
    replace_section(PAGE, "## What an engine costs in accuracy", [about, "", *lines])


if __name__ == "__main__":
    main()
