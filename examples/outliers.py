# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "mlflow==3.17.2", "torch>=2.11", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg",  # of every version
#   "scikit-learn>=1.6",
# ]
# ///
"""Which of these images do not belong to those? `python examples/outliers.py GOOD NEW --out outliers.csv`.

GOOD is a folder of images that are as they should be. The model is asked for the energy F(x, y) of an image with its
nearest images there, which is low where the two belong together; the score is the mean of the lowest few. Half of GOOD is
kept back and scored in the same way: an image of NEW is an outlier where its score is higher than all but a few
(`--false-alarms`) of theirs. `p` in the list is the share of good images that score as high: of images that are as good as
those, 5% have p <= 0.05, however the scores are distributed (a conformal p-value: Vovk, Gammerman & Shafer, 2005).

With `--bad FOLDER`, images known not to belong, it tells how well this works: the AUROC of the energy, beside the distance
of the embeddings from the same nearest images.
"""

import argparse
import csv
import dataclasses
from pathlib import Path

import numpy as np
import pandas
from sklearn.metrics import roc_auc_score

import sheet
from version import CHAMPION, Stop, Version, embed_files, open_version, pictures, run, tell

NEAR = 10
"""So many of the nearest images, by embedding, are asked for their energy: it costs two passes of the network a pair."""
LOWEST = 3
"""The mean of so many is the score: one good image that is itself odd shall not excuse an outlier."""
BATCH = 2048  # pairs


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of each image; high where it does not belong."""

    energy: np.ndarray
    distance: np.ndarray
    """One less the cosine of the embeddings."""
    nearest: list[Path]
    """The good image with which its energy is lowest."""

    def __getitem__(self, chosen: slice) -> "Scores":
        return Scores(self.energy[chosen], self.distance[chosen], self.nearest[chosen])


def score(
    version: Version, vectors: np.ndarray, paths: list[Path], good_vectors: np.ndarray, good: list[Path]
) -> Scores:
    """
    Args:
        version: it must have an energy.
        vectors: (N, D) of unit length, of the images in question.
        paths: their files.
        good_vectors: (M, D) of unit length, of the images that they are compared with; none of them is in question.
        good: their files.
    """
    near, lowest = min(NEAR, len(good)), min(LOWEST, len(good))
    similarity = vectors @ good_vectors.T  # (N, M)
    places = np.argsort(-similarity, axis=1, kind="stable")[:, :near]
    energies = np.empty(places.shape, np.float32)
    at_once = max(1, BATCH // near)
    for start in range(0, len(paths), at_once):
        some = range(start, min(start + at_once, len(paths)))
        pairs = pandas.DataFrame(
            {
                "image": [content for row in some for content in [paths[row].read_bytes()] * near],
                "other": [good[place].read_bytes() for row in some for place in places[row]],
            }
        )
        try:
            answer = version.model.predict(pairs, params={"output": "energy"})
        except ValueError as error:
            if "has no energy" not in str(error):
                raise
            raise Stop(f"{version}: {error}") from error
        energies[start : some.stop] = answer.reshape(-1, near)
    distances = 1 - np.take_along_axis(similarity, places, axis=1)
    return Scores(
        np.sort(energies, axis=1)[:, :lowest].mean(1),
        np.sort(distances, axis=1)[:, :lowest].mean(1),
        [good[row[best]] for row, best in zip(places, energies.argmin(1), strict=True)],
    )


def auroc(inside: np.ndarray, outside: np.ndarray, seed: int = 0, draws: int = 1000) -> tuple[float, np.ndarray]:
    """How often an image from outside scores higher than one from inside, and the same of bootstrapped images, the same
    ones for equal numbers of images and seed."""
    random = np.random.default_rng(seed)

    def value(inside: np.ndarray, outside: np.ndarray) -> float:
        labels = np.repeat([0, 1], [len(inside), len(outside)])
        return float(roc_auc_score(labels, np.concatenate([inside, outside])))

    drawn = [value(random.choice(inside, len(inside)), random.choice(outside, len(outside))) for _ in range(draws)]
    return value(inside, outside), np.array(drawn)


def tell_auroc(kept: Scores, bad: Scores) -> None:
    """The AUROC of energy and distance, and of their difference over the same images, each with its 95% interval."""
    found = {name: auroc(getattr(kept, name), getattr(bad, name)) for name in ("energy", "distance")}
    print(f"{len(bad.nearest)} images known not to belong, against {len(kept.nearest)} good ones:")
    for name, (value, drawn) in found.items():
        low, high = np.quantile(drawn, [0.025, 0.975])
        print(f"  AUROC of the {name:<8}  {value:.4f} (95%: {low:.4f} to {high:.4f})")
    (energy, drawn_energy), (distance, drawn_distance) = found.values()
    low, high = np.quantile(drawn_energy - drawn_distance, [0.025, 0.975])
    print(f"  energy less distance   {energy - distance:+.4f} (95%: {low:+.4f} to {high:+.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("good", type=Path, help="a folder of images that are as they should be; 40 at least")
    parser.add_argument("new", type=Path, help="a folder of images to look at")
    parser.add_argument("--bad", type=Path, help="a folder of images known not to belong, to measure with")
    parser.add_argument(
        "--false-alarms", type=float, default=0.05, help="share of good images that may be listed (0.05)"
    )
    parser.add_argument("--out", type=Path, default=Path("outliers.csv"))
    parser.add_argument("--sheet", type=Path, default=Path("outliers.png"), help="a picture of the strangest")
    parser.add_argument("--seed", type=int, default=0, help="which half of GOOD is kept back")
    parser.add_argument("--model", default=CHAMPION)
    arguments = parser.parse_args()
    for folder in (arguments.good, arguments.new, *([arguments.bad] if arguments.bad else [])):
        pictures(folder)  # before the model is loaded
    if not 0 < arguments.false_alarms < 1:
        raise Stop(f"--false-alarms {arguments.false_alarms}: a share between 0 and 1")
    version = open_version(arguments.model)
    vectors, good = embed(version, arguments.good)
    _check(arguments, len(good))
    order = np.random.default_rng(arguments.seed).permutation(len(good))
    kept, reference = order[: len(order) // 2], order[len(order) // 2 :]
    against = (vectors[reference], [good[one] for one in reference])
    inside = score(version, vectors[kept], [good[one] for one in kept], *against)
    if arguments.bad:
        tell_auroc(inside, score(version, *embed(version, arguments.bad), *against))
    vectors, paths = embed(version, arguments.new)
    new = score(version, vectors, paths, *against)
    p = ((inside.energy >= new.energy[:, None]).sum(1) + 1) / (len(kept) + 1)
    write(arguments, version, paths, new, p)


def _check(arguments: argparse.Namespace, count: int) -> None:
    # With k kept back no p is below 1 / (k + 1).
    needed = max(40, 2 * int(np.ceil(1 / arguments.false_alarms)))
    if count < needed:
        raise Stop(
            f"{arguments.good} has {count} usable images; with --false-alarms {arguments.false_alarms:g} it takes {needed}"
        )


def embed(version: Version, folder: Path) -> tuple[np.ndarray, list[Path]]:
    vectors, usable, rejects = embed_files(version, pictures(folder), normalize=True)
    tell(rejects)
    if not usable:
        raise Stop(f"{folder} holds no usable image")
    return vectors, usable


def write(arguments: argparse.Namespace, version: Version, paths: list[Path], new: Scores, p: np.ndarray) -> None:
    """The list, strangest first, and the picture."""
    order = np.lexsort((-new.energy, p))
    outlier = p <= arguments.false_alarms
    with arguments.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "outlier", "p", "energy", "distance", "nearest"])
        for one in order:
            rows.writerow(
                [paths[one].relative_to(arguments.new), "yes" if outlier[one] else "no", f"{p[one]:.4f}",
                 f"{new.energy[one]:.4f}", f"{new.distance[one]:.4f}", new.nearest[one].relative_to(arguments.good)]
            )  # fmt: skip
    print(
        f"{arguments.out}: {outlier.sum()} of {len(paths)} are outliers ({version}; "
        f"{arguments.false_alarms:.0%} of good images would be listed too)"
    )

    def tiles(chosen: np.ndarray) -> list[tuple[Path, str]]:
        return [(paths[one], f"{new.energy[one]:.3f}   p {p[one]:.3f}\n{paths[one].name}") for one in chosen]

    strangest = order[:8]
    nearest = [(new.nearest[one], str(new.nearest[one].relative_to(arguments.good))) for one in strangest]
    rows = [
        (f"the strangest, with energy and p, by {version}", tiles(strangest)),
        ("the good image that goes best with each", nearest),
        ("the least strange", tiles(order[::-1][:8])),
    ]
    sheet.draw(rows, arguments.sheet)
    print(f"{arguments.sheet}: the strangest")


if __name__ == "__main__":
    run(main)
