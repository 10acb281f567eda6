"""Pictures as PNG files. The same numbers give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Who is scored, in the order in which tables and pictures show them.
SUBJECTS = ("pretrained", "champion", "pixels", "untrained")
_COLOURS = {"pretrained": "#1b6ca8", "champion": "#c98a1b", "pixels": "#8a8f98", "untrained": "#c9ccd1"}


def contact_sheet(originals: Sequence[np.ndarray], views: np.ndarray, path: Path) -> None:
    """A training image a row, and beside it views of it.

    Args:
        originals: (H, W, C) uint8 each, of any size.
        views: (images, views, C, S, S) in [0, 1].
        path: of the PNG.
    """
    rows, columns = len(originals), 1 + views.shape[1]
    with _figure(path, columns, rows + 0.4, grid=(rows, columns)) as axes:
        for row, original in enumerate(originals):
            for axis, image in zip(axes[row], [original / 255, *views[row].transpose(0, 2, 3, 1)], strict=True):
                axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
        axes[0][0].figure.suptitle("training image | views of it, two an epoch")


def few_shot(scores: Mapping[str, Any], path: Path) -> None:
    """Bars with 95% intervals, a group a protocol. Without labels the picture says so."""
    with _figure(path, 9, 3.6) as axes:
        table = {name: row for name, row in scores.get("few_shot", {}).items() if "skipped" not in row}
        subjects = [name for name in SUBJECTS if any(name in row for row in table.values())]
        for index, subject in enumerate(subjects):
            places = np.arange(len(table)) + (index - (len(subjects) - 1) / 2) * 0.8 / len(subjects)
            means = [100 * row[subject]["mean"] for row in table.values()]
            halves = [100 * row[subject]["ci95"] for row in table.values()]
            axes.bar(
                places, means, 0.76 / len(subjects), yerr=halves, label=subject, color=_COLOURS[subject], capsize=2
            )
        axes.set_xticks(range(len(table)), list(table))
        axes.set_ylabel("accuracy, %")
        axes.set_title("Few-shot accuracy on the test split" if table else "No labelled classes to draw episodes from")
        if table:
            axes.legend(ncols=len(subjects), frameon=False, loc="upper left")
            axes.set_ylim(0, 112)


def energies(compatible: np.ndarray, incompatible: np.ndarray, path: Path) -> None:
    """Histograms of the energy of compatible and of incompatible pairs."""
    with _figure(path, 6, 3.2) as axes:
        both = np.concatenate([compatible, incompatible])
        edges = np.linspace(both.min(), both.max(), 41)
        axes.hist(compatible, edges, alpha=0.75, label="two views of one sample", color="#1b6ca8")
        axes.hist(incompatible, edges, alpha=0.75, label="views of two samples", color="#c98a1b")
        axes.set_xlabel("energy")
        axes.set_ylabel("test pairs")
        axes.set_title("The energy is low where a pair is compatible")
        axes.legend(frameon=False)


def history(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss, energy margin and learning rate over the steps."""
    with _figure(path, 9, 2.8, grid=(1, 3)) as axes:
        for axis, name in zip(axes[0], ("loss", "energy_margin", "learning_rate"), strict=True):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), color="#1b6ca8", marker="." if len(points) < 40 else "")
            axis.set_title(name.replace("_", " "))
            axis.set_xlabel("step")


class _figure:  # noqa: N801 (used as a context manager)
    """Axes, or a grid of them, saved when the block ends well."""

    def __init__(self, path: Path, width: float, height: float, *, grid: tuple[int, int] | None = None) -> None:
        self._path, self._size, self._grid = path, (width, height), grid

    def __enter__(self) -> Any:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows, columns = self._grid or (1, 1)
        self._figure, axes = pyplot.subplots(rows, columns, figsize=self._size, layout="constrained", squeeze=False)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        return axes if self._grid else axes[0][0]

    def __exit__(self, kind: Any, *_: Any) -> None:
        from matplotlib import pyplot

        if kind is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._figure.savefig(self._path, dpi=110, metadata={"Software": None})
        pyplot.close(self._figure)
