"""The data path beside what is usually done, side by side in one run.

    make bench                                         # the two photographs of scikit-learn, cut into pieces
    make bench PHOTOS=/usr/share/backgrounds           # any folder of large photographs

Every method has one core and one thread; what counts is images per second of CPU time. Rounds are interleaved, because
machines are noisy; only ratios of one round mean something, and the page shows their median and their range.
"""

import argparse
import datetime
import functools
import hashlib
import io
import multiprocessing
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import torch
import webdataset
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from darkmatter import cluster, files, images, ingest, shards, training_set
from darkmatter.augmentations import Prepared
from darkmatter.sources import SourceConfig
from darkmatter.stream import Stream, permutation

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
BATCH = COUNT = 64  # rounds are short, so that noise that lasts seconds meets all methods of one alike
EPOCHS = 3  # of ours in a round: opening the folder, which a training does once, is in it
SIMCLR: dict[str, Any] = {"min_area": 0.08}
DINO: dict[str, Any] = {
    "min_area": 0.4, "local_views": 8, "jitter": [0.4, 0.4, 0.2, 0.1],
    "blur_probability": [1.0, 0.1, 0.5], "solarize_probability": [0.0, 0.2, 0.0],
}  # fmt: skip
POLICIES = {"2 views (SimCLR)": SIMCLR, "2 + 8 views (DINO)": DINO}


class PillowBlur:
    """What the code of MoCo and DINO uses."""

    def __init__(self, chance: float, least: float, most: float) -> None:
        self.chance, self.sigma = chance, (least, most)

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.chance:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def usual(
    jitter: Sequence[float],
    size: int,
    scale: tuple[float, float],
    blur: float,
    solarize: float,
    *,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    normalise: bool = True,
) -> v2.Compose:
    """A view by Pillow and torchvision, one image at a time: what self-supervised code does."""
    steps = [
        v2.RandomResizedCrop(size, scale=scale),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8),
        v2.RandomGrayscale(0.2),
        PillowBlur(blur, *blur_sigma),
        *([v2.RandomSolarize(128, p=solarize)] if solarize else []),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        *([v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])] if normalise else []),
    ]
    return v2.Compose(steps)


def usual_views(policy: str) -> list[v2.Compose]:
    if policy == "2 views (SimCLR)":
        return [usual([0.4, 0.4, 0.4, 0.1], 224, (0.08, 1.0), 0.5, 0.0)] * 2
    jitter = [0.4, 0.4, 0.2, 0.1]
    whole = [usual(jitter, 224, (0.4, 1.0), *chances) for chances in ((1.0, 0.0), (0.1, 0.2))]
    return [*whole, *[usual(jitter, 96, (0.05, 0.4), 0.5, 0.0)] * 8]


def by_pillow(contents: Sequence[bytes], policy: str) -> None:
    transforms = usual_views(policy)
    for start in range(0, len(contents), BATCH):
        rows = []
        for content in contents[start : start + BATCH]:
            image = Image.open(io.BytesIO(content)).convert("RGB")
            rows.append([transform(image) for transform in transforms])
        for column in zip(*rows, strict=True):
            torch.stack(column)


def by_us(folder: Path, policy: str, engine: str, *, threads: int = 1, steps: int = EPOCHS) -> None:
    """From the tars of the training set, in a global order."""
    options = {"name": "natural", "natural": {"engine": engine, **POLICIES[policy]}}
    spec = training_set.ImageSpec(image_size=224, channels=3, max_side=1, mean=[0.0], std=[1.0])
    views = training_set.choose_views(options, spec)
    load = functools.partial(views.prepare, seed=0, whole=2)
    with shards.Reader(folder, shards.Manifest.load(folder), "train") as reader:
        stream = Stream(reader, load, batch_size=BATCH, seed=0, threads=threads)
        for _ in stream.batches(0, steps):
            pass


def decode_only(contents: Sequence[bytes]) -> None:
    for content in contents:
        images.decode_own(content)


def rounds(
    methods: dict[str, Callable[[], object]], counts: int | dict[str, int], repeat: int
) -> dict[str, list[float]]:
    """Of each method, what it did a second of CPU time, in each round; the first is not counted.

    Args:
        methods: by their names in the table.
        counts: how much each does when it is called.
        repeat: how many rounds.
    """
    if isinstance(counts, int):
        counts = dict.fromkeys(methods, counts)
    found: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeat + 1):
        for name, method in methods.items():
            started = time.process_time()
            method()
            if turn:
                found[name].append(counts[name] / (time.process_time() - started))
    return found


def table(found: dict[str, list[float]], base: str, unit: str) -> list[str]:
    lines = [f"| | {unit} | ratio | of all rounds |", "| --- | --- | --- | --- |"]
    for name, rates in found.items():
        ratios = [rate / reference for rate, reference in zip(rates, found[base], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {name} | {statistics.median(rates):,.0f} | {statistics.median(ratios):.2f} | {spread} |")
    return lines


def cut_photographs(folder: Path | None, out: Path) -> list[bytes]:
    """Natural JPEGs of 500 x 375 pixels, qualities 84 to 96, out of large photographs."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        large = [Image.fromarray(image) for image in load_sample_images().images]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        found = (Image.open(path) for path in paths if path.stat().st_size > 100_000)
        large = [image.convert("RGB") for image in found if min(image.size) >= 750]
    choose, contents = random.Random(0), list[bytes]()
    out.mkdir(parents=True)
    for attempt in range(100 * COUNT):
        image = large[attempt % len(large)]
        most = min(image.width / 500, image.height / 375)
        zoom = choose.uniform(min(1.0, most), most)
        width, height = int(500 * zoom), int(375 * zoom)
        left, top = choose.randint(0, image.width - width), choose.randint(0, image.height - height)
        file = io.BytesIO()
        piece = image.resize((500, 375), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        piece.save(file, "JPEG", quality=choose.randint(84, 96))
        if len(file.getvalue()) > 60_000:  # a piece of sky is no photograph; ImageNet's have 110 KB
            (out / f"{len(contents):05d}.jpg").write_bytes(file.getvalue())
            contents.append(file.getvalue())
        if len(contents) == COUNT:
            break
    return contents


def make_training_set(source: SourceConfig, out: Path, *, max_side: int) -> None:
    """By the stages themselves."""
    config = ingest.IngestConfig(
        samples_per_shard=64, val_fraction=0.0, test_fraction=0.0, max_pixels=10**7, max_file_mebibytes=64,
        max_decode_seconds=60.0, max_decode_mebibytes=2048, near_duplicates=-1, drop_removed=False,
    )  # fmt: skip
    ingest.ingest(source, config, out=out / "shards")
    augment = training_set.AugmentConfig(
        image_size=224, channels=3, max_side=max_side, encoding="jpeg", views={"name": "natural"}
    )
    training_set.build(out / "shards", augment, out / "train")


def pack(contents: Sequence[bytes], photographs: Path, work: Path) -> None:
    """Below `work`: `originals`, the photographs as they are, and `small`, what the stages make of them."""
    originals = work / "originals"
    originals.mkdir()
    samples = [
        shards.Sample(key=f"{number:032x}", content=content, extension="jpg") for number, content in enumerate(contents)
    ]
    shard = shards.write_shard(originals / "train-000000.tar", samples, split="train")
    shards.Manifest(classes=None, shards=[shard]).save(originals)
    with cluster.session():
        make_training_set(
            SourceConfig(uri=f"folder:{photographs}", labels=False), work / "small", max_side=341
        )  # short side 256


def views_section(contents: Sequence[bytes], work: Path, repeat: int) -> list[str]:
    originals, small = work / "originals", work / "small" / "train"
    with shards.Reader(small, shards.Manifest.load(small), "train") as reader:
        stored = [reader.read(index) for index in range(len(reader))]
    sizes = [statistics.fmean(map(len, some)) / 1000 for some in (contents, stored)]
    lines = []
    for policy in POLICIES:
        base = "Pillow + torchvision v2 (A2)"
        methods: dict[str, Callable[[], object]] = {base: lambda policy=policy: by_pillow(contents, policy)}
        for engine in ("exact", "fast", "device"):
            about = f"`{engine}`" + (", the CPU's half" if engine == "device" else "")
            methods[about] = lambda policy=policy, engine=engine: by_us(originals, policy, engine)
        methods["decode only: the ceiling"] = lambda: decode_only(contents)
        methods["A2 from training images"] = lambda policy=policy: by_pillow(stored, policy)
        for engine in ("exact", "fast", "device"):
            about = f"`{engine}`" + (", the CPU's half" if engine == "device" else "") + ", from training images"
            methods[about] = lambda policy=policy, engine=engine: by_us(small, policy, engine)
        counts = {name: COUNT * (EPOCHS if name.startswith("`") else 1) for name in methods}
        found = rounds(methods, counts, repeat)
        lines += [f"### {policy}", "", *table(found, base, "images/CPU-s"), ""]
        print("\n".join(lines[-len(found) - 4 :]), flush=True)
    about = (
        f"{COUNT} natural JPEGs of 500 x 375, {sizes[0]:.0f} KB; training images as `augment` writes them (short side 256, "
        f"quality 90), {sizes[1]:.0f} KB. A2 decodes and cuts with Pillow {PIL.__version__}, jitters with torchvision v2, "
        "blurs with Pillow, gives normalised float32; it has the bytes in memory. Ours reads tars in global order, gives "
        "uint8, which the device scales."
    )
    return ["## Views of photographs, from bytes to batches", "", about, "", *lines]


def device_section(repeat: int) -> list[str]:
    """What `device` leaves to the device, where there is one."""
    title, batch = "## The device's half of `device`", 256
    if not torch.cuda.is_available():
        return [title, "", "Not measured: no GPU."]
    device = torch.device("cuda")
    spec = training_set.ImageSpec(image_size=224, channels=3, max_side=1, mean=[0.0], std=[1.0])
    views = training_set.choose_views({"name": "natural", "natural": {"engine": "device", **SIMCLR}}, spec)
    pixels = torch.randint(0, 256, (2, batch, 224, 224, 3), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    prepared = Prepared(
        pixels=tuple(pixels),
        sizes=torch.full((batch, 2), 224, device=device),
        samples=torch.arange(batch, device=device),
    )
    lines = ["| | views/s |", "| --- | --- |"]
    for name, finish in (("eager", views.finish), ("torch.compile", torch.compile(views.finish))):
        rates = []
        for turn in range(repeat + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(10):
                finish(prepared, seed=0, epoch=0, whole=2)
            torch.cuda.synchronize()
            rates += [20 * batch / (time.perf_counter() - started)] if turn > 1 else []
        lines.append(f"| {name} | {statistics.median(rates):,.0f} |")
        print(lines[-1], flush=True)
    return [
        title,
        "",
        f"{torch.cuda.get_device_name()}: colour and blur of 2 x {batch} views of 224 pixels.",
        "",
        *lines,
    ]


def reading_section(work: Path, repeat: int) -> list[str]:
    """Without decoding: 20,000 samples of 96 KB."""
    folder, count = work / "reading", 20_000
    folder.mkdir()
    content = random.Random(0).randbytes(96_000)
    parts = []
    for number in range(count // 1000):
        samples = [
            shards.Sample(key=f"{number * 1000 + one:032x}", content=content, extension="jpg") for one in range(1000)
        ]
        parts.append(shards.write_shard(folder / f"train-{number:06d}.tar", samples, split="train"))
    manifest = shards.Manifest(classes=None, shards=parts)
    manifest.save(folder)
    urls = [str(folder / shard.path) for shard in parts]

    def ours() -> None:
        with shards.Reader(folder, manifest, "train") as reader:
            for index in permutation(0, 0, len(reader)).tolist():
                reader.read(index)

    def theirs() -> None:
        for _ in webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000):
            pass

    def cat() -> None:
        for url in urls:
            with open(url, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass

    methods = {
        "webdataset, shuffled (shards, and a buffer of 1,000)": theirs,
        "ours, a global permutation": ours,
        "every byte, in order: the ceiling": cat,
    }
    found = rounds(methods, count, repeat)
    lines = table(found, next(iter(methods)), "samples/CPU-s")
    print("\n".join(lines), flush=True)
    about = f"{count:,} samples of 96 KB, in the page cache, without decoding."
    return ["## Reading", "", about, "", *lines, ""]


def packing_section(work: Path, repeat: int) -> list[str]:
    """Bytes in memory to tars."""
    content = random.Random(1).randbytes(96_000)
    count = 2000
    folder = work / "packing"
    folder.mkdir()
    named = [(f"{number:032x}", content, 3) for number in range(count)]

    def ours() -> None:
        for start in range(0, count, 500):
            samples = [
                shards.Sample(key=key, content=one, extension="jpg", label=label)
                for key, one, label in named[start : start + 500]
            ]
            shards.write_shard(folder / f"train-{start:06d}.tar", samples, split="train")

    def theirs() -> None:
        with webdataset.ShardWriter(f"{folder}/w-%06d.tar", maxcount=500, verbose=0) as writer:
            for key, one, label in named:
                writer.write({"__key__": key, "jpg": one, "cls": label})

    def hash_only() -> None:
        for _, one, _ in named:
            hashlib.sha256(one)

    methods = {
        "webdataset's ShardWriter": theirs,
        "ours, with index, sha256 and fsync": ours,
        "sha256 alone: the ceiling of ours": hash_only,
    }
    found = rounds(methods, count, repeat)
    lines = table(found, "webdataset's ShardWriter", "files/CPU-s")
    print("\n".join(lines), flush=True)
    return ["## Packing", "", f"{count:,} samples of 96 KB and a label each, from memory.", "", *lines, ""]


def threads_section(work: Path, repeat: int) -> list[str]:
    """By the clock, since CPU time says nothing of it."""
    lines = [
        "| engine | first batch, s | 1 thread, images/s | 2 threads | ratio | of all rounds | 2 processes, ratio |",
        "| --- " * 7 + "|",
    ]
    folder, policy, steps = work / "originals", "2 views (SimCLR)", 8

    def clock(engine: str, threads: int) -> float:
        started = time.perf_counter()
        by_us(folder, policy, engine, threads=threads, steps=steps)
        return time.perf_counter() - started

    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for engine in ("exact", "fast", "device"):
            started = time.perf_counter()
            by_us(folder, policy, engine, steps=1)
            first = time.perf_counter() - started
            taken = []
            for turn in range(repeat + 1):
                one, two = clock(engine, 1), clock(engine, 2)
                started = time.perf_counter()
                share = functools.partial(by_us, folder, policy, engine, steps=steps)
                for done in [pool.apply_async(share) for _ in range(2)]:
                    done.get()
                taken += [(one, two, (time.perf_counter() - started) / 2)] if turn else []
            threads, processes = ([row[0] / row[column] for row in taken] for column in (1, 2))
            rates = [steps * BATCH / statistics.median(row[column] for row in taken) for column in (0, 1)]
            lines.append(
                f"| `{engine}` | {first:.2f} | {rates[0]:,.0f} | {rates[1]:,.0f} | {statistics.median(threads):.2f} | "
                f"{min(threads):.2f} to {max(threads):.2f} | {statistics.median(processes):.2f} |"
            )
            print(lines[-1], flush=True)
    about = (
        f"By the clock, on a machine of {os.cpu_count()} cores that others use as well; batches of {BATCH}. The first "
        "batch is counted from opening the folder, with one thread. Two processes, each with as much to do as the one "
        "thread, say what the machine gives."
    )
    return ["## Two threads", "", about, "", *lines, ""]


def million_section(work: Path) -> list[str]:
    """Opening, resuming and reading where an epoch has a million samples; by the clock, in a process of its own."""
    folder, count, each = work / "million", 1_000_000, 4096
    folder.mkdir()
    parts = []
    for start in range(0, count, each):
        samples = (
            shards.Sample(key=f"{number:032x}", content=b"%08d" % number * 12, extension="png")
            for number in range(start, min(start + each, count))
        )
        parts.append(shards.write_shard(folder / f"train-{start // each:06d}.tar", samples, split="train"))
    shards.Manifest(classes=None, shards=parts).save(folder)
    context = multiprocessing.get_context("spawn")
    lines = [
        "| order | first batch, s | at step 3,000 | in epoch 7 | samples/s | MiB |",
        "| --- | " + "--- | " * 5,
    ]
    for window, name in ((0, "one permutation"), (16, f"16 of {len(parts)} shards at a time")):
        with context.Pool(1) as pool:
            first, middle, later, rate, peak = pool.apply(stream_million, (folder, window))
        lines.append(f"| {name} | {first:.2f} | {middle:.2f} | {later:.2f} | {rate:,.0f} | {peak:.0f} |")
        print(lines[-1], flush=True)
    about = (
        f"{count:,} samples of 96 bytes in {len(parts)} shards, batches of 256, without decoding, one thread; seconds from "
        "opening the folder to the batch; what all this adds to the memory of the process."
    )
    return ["## A million samples", "", about, "", *lines, ""]


def stream_million(folder: Path, window: int) -> tuple[float, float, float, float, float]:
    def load(contents: Sequence[bytes], samples: np.ndarray, *, epoch: int) -> None:
        if [int(content[:8]) for content in contents] != samples.tolist():
            raise ValueError("not what was asked for")

    before = psutil.Process().memory_info().rss
    seconds = []
    for step in (0, 3000, 7 * 3906 + 11):
        started = time.perf_counter()
        with shards.Reader(folder, shards.Manifest.load(folder), "train") as reader:
            stream = Stream(reader, load, batch_size=256, seed=0, window=window)
            next(iter(stream.batches(step, step + 1)))
            seconds.append(time.perf_counter() - started)
    with shards.Reader(folder, shards.Manifest.load(folder), "train") as reader:
        started = time.perf_counter()
        for _ in Stream(reader, load, batch_size=256, seed=0, window=window).batches(0, 1000):
            pass
        rate = 256_000 / (time.perf_counter() - started)
        more = (psutil.Process().memory_info().rss - before) / 2**20
    return seconds[0], seconds[1], seconds[2], rate, more


_HEAD = """# Performance

Measured, never promised: absolute figures belong to the machine of the day, ratios were taken in one run.

"""


def replace_section(page: Path, title: str, lines: Sequence[str]) -> None:
    """Puts a section in place of the one with its title, or at the end."""
    parts = re.split(r"^(?=## )", page.read_text(), flags=re.MULTILINE) if page.is_file() else [_HEAD]
    section = "\n".join([title, "", *lines]).rstrip() + "\n\n"
    places = [number for number, part in enumerate(parts) if part.startswith(title + "\n")] or [len(parts)]
    parts[places[0] : places[0] + 1] = [section]
    files.write(page, "".join(part.rstrip() + "\n\n" for part in parts).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=Path, help="folder of large JPEGs; else scikit-learn's two")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        contents = cut_photographs(arguments.photographs, work / "photographs")
        pack(contents, work / "photographs", work)
        sections = [
            views_section(contents, work, arguments.rounds),
            device_section(arguments.rounds),
            threads_section(work, arguments.rounds),
            reading_section(work, arguments.rounds),
            packing_section(work, arguments.rounds),
            million_section(work),
        ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    how = (
        f"`make bench`, {datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, {gpu}; one core and one "
        f"thread a method, medians of {arguments.rounds} interleaved rounds."
    )
    for title, _, *lines in sections:
        replace_section(PAGE, title, [how, "", *lines])


if __name__ == "__main__":
    main()
