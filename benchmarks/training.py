"""What training waits for, side by side in one run: two views of each image, from shards to float tensors.

    make bench        # after make demo; writes docs/performance.md

Ours: one indexed read, one decode, both views drawn for the whole batch at once. The usual loader: WebDataset, Pillow and
torchvision v2, one image at a time. Same shards, same policy (SimCLR's), one process, the same number of torch threads.
Rounds are interleaved, because machines are noisy; only the ratio means something.
"""

import argparse
import datetime
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torchvision.transforms import v2

from darkmatter import shards, training_set
from darkmatter.augmentations import ImageBatch
from darkmatter.stream import Stream

ROOT = Path(__file__).parent.parent
BATCH = 128


def ours(folder: Path, size: int, steps: int) -> None:
    spec = training_set.load_image_spec(folder)
    views = training_set.choose_views({"name": "natural"}, size)
    with shards.Reader(folder, shards.Manifest.load(folder), "train") as reader:
        stream = Stream(reader, training_set.batch_loader(spec), batch_size=BATCH, seed=0)
        for batch in stream.batches(0, steps):
            images = batch.loaded  # in colour, like the other side
            colour = ImageBatch(pixels=images.pixels.expand(-1, 3, -1, -1), sizes=images.sizes, samples=images.samples)
            views(colour, seed=0, epoch=batch.epoch)


def usual(folder: Path, size: int, steps: int) -> None:
    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(max(3, size // 10 // 2 * 2 + 1))], p=0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    samples = iter(webdataset.WebDataset(urls, shardshuffle=False).repeat())
    for _ in range(steps):
        images = []
        for _ in range(BATCH):
            sample = next(samples)
            content = sample.get("png") or sample["jpg"]
            images.append(Image.open(io.BytesIO(content)).convert("RGB"))
        for _ in range(2):
            torch.stack([view(image) for image in images])


def rate(function: Callable[[Path, int, int], None], folder: Path, size: int, steps: int) -> float:
    started = time.perf_counter()
    function(folder, size, steps)
    return steps * BATCH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, default=ROOT / "data" / "train", help="what the stage augment wrote")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if not (arguments.train / "manifest.json").is_file():
        parser.error(f"{arguments.train} holds no training set; run `make demo` first")
    manifest = shards.Manifest.load(arguments.train)
    lines = []
    for size in (28, 96):
        ours(arguments.train, size, 1)
        usual(arguments.train, size, 1)
        pairs = [
            tuple(rate(one, arguments.train, size, arguments.steps) for one in (ours, usual))
            for _ in range(arguments.rounds)
        ]
        ratios = [first / second for first, second in pairs]
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        lines.append(f"| {size} | {first:,.0f} | {second:,.0f} | {np.median(ratios):.1f} | {spread} |")
        print(lines[-1], flush=True)
    page = f"""# Performance

Measured, never promised: absolute figures belong to the machine of the day, ratios were taken in one run.

## Two views of each image, from shards to tensors

`make bench`, {datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} torch threads, no GPU,
{manifest.samples("train"):,} images of {arguments.train.name} (the built-in digits), batches of {BATCH}, medians of
{arguments.rounds} interleaved rounds. Ours has an unfaithful hue (YIQ, not HSV) and bilinear sampling; see
`augmentations/natural.py`.

| view, pixels | ours, images/s | WebDataset + Pillow + torchvision v2, images/s | ratio | of all rounds |
| --- | --- | --- | --- | --- |
{chr(10).join(lines)}
"""
    (ROOT / "docs" / "performance.md").write_text(page)


if __name__ == "__main__":
    main()
