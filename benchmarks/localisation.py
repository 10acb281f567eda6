"""Does a representation know where things are? Joint-embedding with strong and with mild crops beside masked methods.

    python benchmarks/localisation.py /usr/share/openclipart/png     # a folder a class; writes into docs/evaluation.md

All have the same backbone, samples, order, steps and optimizer. A joint-embedding method that is shown two crops of a
picture and asked for one answer is asked to forget where the crops lay; one that must fill in what is hidden is not.
Differences to SimCLR with strong crops are paired by seed, and intervals are over seeds: two trainings differ more than
test samples do.
"""

import argparse
import datetime
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import in_process
from darkmatter import cluster, evaluate, files, images
from data import replace_section
from objectives import OPTIONS

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
BATCH, SIZE, WIDTH = 128, 32, 16
AUGMENT: dict[str, Any] = {
    "image_size": SIZE,
    "channels": 3,
    "max_side": 48,
    "encoding": "png",
    "views": {"name": "natural"},
}
STRONG, MILD = {"min_area": 0.08, "engine": "fast"}, {"min_area": 0.6, "engine": "fast"}  # 0.08 is SimCLR's
PLAIN = {**MILD, "jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": [0.0] * 3}
#: Method and views; the masked ones' papers have crops and mirror images only.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "simclr, crops from 8 %": ("simclr", STRONG),
    "simclr, crops from 60 %": ("simclr", MILD),
    "vicreg, crops from 8 %": ("vicreg", STRONG),
    "mae": ("mae", PLAIN),
    "ijepa": ("ijepa", PLAIN),
}
SECTION = {
    "seed": 0,
    "few_shot": {"ways": [5], "shots": [5], "episodes": 600, "queries": 15},
    "localisation": {},
}
COLUMNS = {
    "place, R²": ("localisation", "position"),
    "patches, AUROC": ("localisation", "segmentation"),
    "5-way 5-shot": ("few_shot", "5-way 5-shot"),
}


def shrink(source: Path, to: Path) -> None:
    """Each picture at the size that training sees, once: whoever is evaluated decodes them all again."""
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    with multiprocessing.get_context("forkserver").Pool() as pool:
        for path, content in zip(paths, pool.imap(shrunk, paths, chunksize=16), strict=True):
            if content:
                files.write(to / path.relative_to(source).with_suffix(".png"), content)


def shrunk(path: Path) -> bytes:
    """Nothing, if it is no picture."""
    try:
        pixels = images.decode(path.read_bytes(), max_pixels=64_000_000)
    except images.Rejected:
        return b""
    return images.encode(pixels, max_side=AUGMENT["max_side"], channels=3, encoding="png")


def measure(folder: Path, side: str, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Column -> subject -> mean; the subjects are the trained network, the same untrained, and pixels."""
    method, views = SIDES[side]
    spec = in_process.specification(
        folder,
        {"name": method, method: OPTIONS[method]},
        {"name": "natural", "natural": views},
        {"name": "small_conv", "small_conv": {"width": WIDTH}},
    )
    with tempfile.TemporaryDirectory() as name:
        in_process.train(folder, spec, in_process.pretraining(seed=seed, epochs=epochs, batch_size=BATCH), Path(name))
        place = in_process.place(folder)  # pixels are the same for all
        tree = evaluate.evaluate(Path(name) / "model", folder / "shards", SECTION, champion=None, place=place).tree
    rows = {column: tree[evaluation][protocol] for column, (evaluation, protocol) in COLUMNS.items()}
    return {
        column: {subject: score["mean"] for subject, score in row.items() if subject != "advantage"}
        for column, row in rows.items()
    }


def interval(values: np.ndarray, *, signed: bool = False) -> str:
    """Mean and 95% interval over seeds, by Student's t."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{values.mean():{'+' if signed else ''}.3f} ± {half:.3f}"


def table(found: dict[str, list[dict[str, dict[str, float]]]]) -> list[str]:
    first = next(iter(found))
    trained = {
        side: {c: np.array([run[c]["pretrained"] for run in runs]) for c in COLUMNS} for side, runs in found.items()
    }
    lines = [
        "| | " + " | ".join(COLUMNS) + f" | place, less {first} | patches, less {first} |",
        "| --- |" + " --- |" * (len(COLUMNS) + 2),
    ]
    for side, columns in trained.items():
        cells = [interval(values) for values in columns.values()]
        for column in ("place, R²", "patches, AUROC"):
            less = columns[column] - trained[first][column]
            cells.append("" if side == first else interval(less, signed=True))
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    for subject in ("untrained", "pixels"):
        cells = []
        for column in COLUMNS:
            values = np.array([run[column][subject] for run in found[first] if subject in run[column]])
            cells.append("" if not len(values) else interval(values) if subject == "untrained" else f"{values[0]:.3f}")
        lines.append(f"| *{subject}* | " + " | ".join(cells) + " | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with a folder of images for each class")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name, cluster.session():
        folder = Path(name)
        shrink(arguments.source, folder / "files")
        in_process.prepare(f"folder:{folder}/files", folder, AUGMENT, val=0.08, test=0.2)
        for seed in range(arguments.seeds):
            for side, runs in found.items():
                runs.append(measure(folder, side, seed, arguments.epochs))
                print(json.dumps({"side": side, "seed": seed, **runs[-1]}), flush=True)
    replace_section(PAGE, "## Who knows where", section(found, arguments.source, arguments.epochs))


def section(found: dict[str, list[dict[str, dict[str, float]]]], source: Path, epochs: int) -> list[str]:
    about = (
        f"`python benchmarks/localisation.py {source}`, {datetime.date.today()}, torch {torch.__version__}: `small_conv` of "
        f"width {WIDTH} at {SIZE} pixels, {epochs} epochs of batch {BATCH}, {len(next(iter(found.values())))} seeds, "
        "intervals over seeds (Student's t, 95%); differences are paired by seed."
    )
    return [about, "", *table(found)]


if __name__ == "__main__":
    main()
