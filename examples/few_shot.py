# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "mlflow==3.17.2", "torch>=2.11", "numpy", "pandas", "pillow", "jaxtyping", "simplejpeg",  # of every version
#   "scikit-learn>=1.6",
# ]
# ///
"""A classifier from five labels a class: `python examples/few_shot.py LABELLED UNLABELLED --out predictions.csv`.

LABELLED has a folder of images for each class. Five of each are learned from; from the rest, where there is one, the
accuracy is told. Every image of UNLABELLED gets a line: file, label, confidence.

What is fitted on the embeddings of the champion is a logistic regression, or the centroid of each class. Its one constant
is the one under which each fifth of the labelled images is best foretold by the others, so that the confidence means
something.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from version import CHAMPION, Stop, embed_files, open_version, pictures, run, tell

DRAWS = 20
"""Other choices of five images, to see how much depends on them."""


class Centroids(ClassifierMixin, BaseEstimator):
    """The probability of a class: exp(scale * cosine of the image and the mean image of the class), of all classes one."""

    def __init__(self, scale: float = 10.0) -> None:
        self.scale = scale

    def fit(self, embeddings: np.ndarray, labels: np.ndarray) -> "Centroids":
        self.classes_ = np.unique(labels)
        means = np.stack([embeddings[labels == one].mean(0) for one in self.classes_])
        self.centroids_ = means / np.linalg.norm(means, axis=1, keepdims=True)
        return self

    def predict_proba(self, embeddings: np.ndarray) -> np.ndarray:
        logits = self.scale * embeddings @ self.centroids_.T
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        return self.classes_[self.predict_proba(embeddings).argmax(1)]


HEADS = {
    "logistic": (LogisticRegression(max_iter=1000), {"C": [1, 10, 100, 1000]}),
    "centroid": (Centroids(), {"scale": [3, 10, 30, 100, 300]}),
}


def fit(head: str, embeddings: np.ndarray, labels: np.ndarray, shots: int) -> BaseEstimator:
    """With its constant chosen, where there is more than one image a class to choose it by."""
    estimator, constants = HEADS[head]
    if shots == 1:
        return clone(estimator).fit(embeddings, labels)
    search = GridSearchCV(estimator, constants, scoring="neg_log_loss", cv=min(shots, 5))
    return search.fit(embeddings, labels).best_estimator_


def draw(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Whether each image is learned from: `shots` of each class."""
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for one in np.unique(labels):
        chosen[random.choice(np.flatnonzero(labels == one), shots, replace=False)] = True
    return chosen


def interval(right: int, of: int) -> tuple[float, float]:
    """Of a share, 95% (E. B. Wilson, 1927)."""
    z = 1.96
    share, scale = right / of, 1 + z * z / of
    half = z * np.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (share + z * z / (2 * of) - half) / scale, (share + z * z / (2 * of) + half) / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path, help="a folder of images for each class")
    parser.add_argument("unlabelled", type=Path, help="a folder of images to classify")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"))
    parser.add_argument("--shots", type=int, default=5, help="images a class to learn from (default: 5)")
    parser.add_argument("--head", choices=HEADS, default="logistic")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--model", default=CHAMPION)
    arguments = parser.parse_args()
    if arguments.shots < 1:
        raise Stop(f"--shots {arguments.shots}: at least one image of a class is needed")
    labelled, unlabelled = pictures(arguments.labelled), pictures(arguments.unlabelled)
    version = open_version(arguments.model)
    vectors, usable, rejects = embed_files(version, labelled, normalize=True)
    tell(rejects)
    labels = np.array([path.relative_to(arguments.labelled).parts[0] for path in usable])
    _check(arguments, {path.relative_to(arguments.labelled).parts for path in labelled}, labels)
    known = draw(labels, arguments.shots, arguments.seed)
    head = fit(arguments.head, vectors[known], labels[known], arguments.shots)
    print(f"{version}: {len(np.unique(labels))} classes of {arguments.shots} images, head {arguments.head}")
    if not known.all():
        _tell_accuracy(head, vectors[~known], labels[~known])
        shares = []
        for seed in range(arguments.seed + 1, arguments.seed + 1 + DRAWS):
            known = draw(labels, arguments.shots, seed)
            other = clone(head).fit(vectors[known], labels[known])  # with the constant of the first
            shares.append((other.predict(vectors[~known]) == labels[~known]).mean())
        print(f"{DRAWS} other draws of {arguments.shots} images a class: {min(shares):.1%} to {max(shares):.1%}")
    vectors, usable, rejects = embed_files(version, unlabelled, normalize=True)
    tell(rejects)
    if not usable:
        raise Stop(f"{arguments.unlabelled} holds no usable image")
    chances = head.predict_proba(vectors)
    with arguments.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "confidence"])
        for path, chance in zip(usable, chances, strict=True):
            rows.writerow(
                [path.relative_to(arguments.unlabelled), head.classes_[chance.argmax()], f"{chance.max():.4f}"]
            )
    print(f"{arguments.out}: {len(usable)} images" + (f", {len(rejects)} left out" if rejects else ""))


def _check(arguments: argparse.Namespace, parts: set[tuple[str, ...]], labels: np.ndarray) -> None:
    loose = sum(len(one) == 1 for one in parts)
    if loose:
        raise Stop(f"{arguments.labelled} holds {loose} images that are in no folder of a class")
    counts = {one: int((labels == one).sum()) for one in sorted({one[0] for one in parts})}
    if len(counts) < 2:
        raise Stop(f"{arguments.labelled} has one class, {next(iter(counts))}; a classifier needs two")
    few = [f"{one} has {count}" for one, count in counts.items() if count < arguments.shots]
    if few:
        raise Stop(
            f"{arguments.labelled}: {arguments.shots} usable images of each class are needed, and {', '.join(few)}; "
            f"add some, or say --shots {max(1, min(counts.values()))}"
        )


def _tell_accuracy(head: BaseEstimator, vectors: np.ndarray, labels: np.ndarray) -> None:
    chances = head.predict_proba(vectors)
    right = int((head.classes_[chances.argmax(1)] == labels).sum())
    low, high = interval(right, len(labels))
    print(
        f"accuracy {right / len(labels):.1%} (95%: {low:.1%} to {high:.1%}) on the {len(labels)} labelled images that it "
        f"did not learn from; its mean confidence there is {chances.max(1).mean():.1%}"
    )


if __name__ == "__main__":
    run(main)
