"""Pictures as PNG files. The same numbers give the same bytes."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_FIRST = ("pretrained", "champion", "pixels", "histogram", "untrained")
_COLOURS = {
    "pretrained": "#1b6ca8", "champion": "#c98a1b", "pixels": "#5c6670", "histogram": "#a36fa8", "untrained": "#b4b9c0",
}  # fmt: skip
_OTHERS = ("#2a9d8f", "#b5483a", "#7a8b2c", "#4b4b9b")


def subjects(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Who is scored in any of these rows, in the order in which tables and pictures show them."""
    found = dict.fromkeys(name for row in rows for name in row if name not in ("advantage", "skipped"))
    return [*(name for name in _FIRST if name in found), *(name for name in found if name not in _FIRST)]


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
    """Accuracy over shots with 95% intervals, a panel for each number of ways: lines by nearest centroid, dashed ones by
    logistic regression. Without labels the picture says so."""
    table = {name: row for name, row in scores.get("few_shot", {}).items() if "skipped" not in row}
    panels = list(dict.fromkeys(name.split("-way")[0] for name in table))
    if not panels:
        with _figure(path, 9, 1) as axes:
            axes.set_title("No labelled classes to draw episodes from")
            axes.set_axis_off()
        return
    everyone = subjects(table.values())
    colours = dict(zip([name for name in everyone if name not in _COLOURS], itertools.cycle(_OTHERS), strict=False))
    with _figure(path, 9, 3.8, grid=(1, len(panels))) as axes:
        for axis, ways in zip(axes[0], panels, strict=True):
            for subject, (ending, style) in itertools.product(everyone, (("", "-"), (" logistic", "--"))):
                points = {
                    int(found[1]): row[subject]
                    for name, row in table.items()
                    if (found := re.fullmatch(rf"{ways}-way (\d+)-shot{ending}", name)) and subject in row
                }
                if points:
                    axis.errorbar(
                        list(points),
                        [100 * one["mean"] for one in points.values()],
                        [100 * one["ci95"] for one in points.values()],
                        label=None if ending else subject,
                        color=_COLOURS.get(subject) or colours[subject],
                        linestyle=style,
                        linewidth=1 if ending else 1.8,
                        capsize=2,
                        marker="" if ending else "o",
                        markersize=3.5,
                    )
            shots = sorted({int(name.split()[1].split("-")[0]) for name in table if name.startswith(f"{ways}-way")})
            axis.set_xscale("log")
            axis.set_xticks(shots, [str(one) for one in shots], minor=False)
            axis.minorticks_off()
            axis.set_xlabel("labelled samples a class")
            axis.set_title(f"{ways}-way" if ways != "all" else "all classes")
            axis.set_ylim(0, 102)
            axis.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axes[0][0].set_ylabel("accuracy on the test split, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=len(labels),
            frameon=False,
            title="nearest centroid (dashed: logistic regression)",
        )


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


def neighbours(rows: Sequence[Sequence[np.ndarray]], path: Path) -> None:
    """A sample a row, and to its right those of the training split that are nearest to it; (C, S, S) uint8 each."""
    columns = max(len(row) for row in rows)
    with _figure(path, columns, len(rows) + 0.4, grid=(len(rows), columns)) as axes:
        for row, line in zip(rows, axes, strict=True):
            for axis, picture in zip(line, row, strict=False):
                _show(axis, picture)
            for axis in line:
                axis.set_axis_off()
            line[0].add_patch(_frame(line[0]))
        axes[0][0].figure.suptitle("held-out image | nearest training images, nearest first")


def map_of(points: np.ndarray, thumbnails: Sequence[np.ndarray], path: Path) -> None:
    """Thumbnails, (C, S, S) uint8, at their places, (samples, 2) in [0, 1]."""
    with _figure(path, 9, 9) as axes:
        side = 0.028
        for (x, y), picture in zip(points, thumbnails, strict=True):
            _show(axes, picture, extent=(x - side / 2, x + side / 2, y - side / 2, y + side / 2))
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.set_axis_off()
        axes.set_title("Held-out images, alike ones together (t-SNE of the embeddings)")


def patches(images: Sequence[np.ndarray], colours: np.ndarray, path: Path) -> None:
    """Images, (C, S, S) uint8, and below each its patches in colours, (images, grid, grid, 3)."""
    with _figure(path, len(images), 2.4, grid=(2, len(images))) as axes:
        for column, (picture, coloured) in enumerate(zip(images, colours, strict=True)):
            _show(axes[0][column], picture)
            axes[1][column].imshow(coloured, interpolation="nearest")
            for row in (0, 1):
                axes[row][column].set_axis_off()
        axes[0][0].figure.suptitle("held-out images | first three principal components of their patches")


def _show(axes: Any, picture: np.ndarray, **options: Any) -> None:
    axes.imshow(picture.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255, **options)


def _frame(axes: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor="#1b6ca8", linewidth=3)


def history(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Over the steps: the loss and each of its terms, health, rate and gradient."""
    known = ("energy_margin", "rankme", "learning_rate", "gradient_norm")
    others = {"step", "epoch", "workers", "images_per_second", "spread", "loss", *known}
    names = dict.fromkeys(name for row in rows for name in row)
    terms = [name for name in names if name not in others and not name.startswith(("seconds_", "skipped_"))]
    shown = ["loss", *(terms if len(terms) > 1 else []), *(name for name in known if name in names)]
    lines = -(-len(shown) // 3)
    with _figure(path, 9, 2.3 * lines, grid=(lines, 3)) as axes:
        for axis, name in itertools.zip_longest(axes.flat, shown):
            if name is None:
                axis.set_axis_off()
                continue
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
