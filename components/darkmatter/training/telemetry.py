"""A run as Prometheus sees it while it trains: docs/monitoring.md. Ray carries the numbers, under `ray_<name>`."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from darkmatter import cluster
from darkmatter.beside import beside
from darkmatter.training import PretrainConfig, goodput, history
from darkmatter.training.history import Row

NUMBERS = {
    "darkmatter_step": "Steps done.",
    "darkmatter_steps_planned": "Steps of the whole run.",
    "darkmatter_epoch": "Passes over the data, begun with 0.",
    "darkmatter_images_per_second": "Since the last row of the history, of all workers together.",
    "darkmatter_loss": "Mean over the ranks at the last row.",
    "darkmatter_energy_margin": "AUROC of compatible against incompatible pairs, held out; 0.5 is collapse.",
    "darkmatter_energy_margin_floor": "pretrain.min_energy_margin: below it training ends as collapsed.",
    "darkmatter_rankme": "Dimensions that held-out embeddings use.",
    "darkmatter_spread": "Standard deviation of held-out embeddings of unit length.",
    "darkmatter_gradient_norm": "Before it is clipped.",
    "darkmatter_learning_rate": "The largest of all parameters.",
    "darkmatter_skipped_not_finite": "Steps left out since a number was not finite.",
    "darkmatter_skipped_spikes": "Steps left out since the gradient leaped.",
    "darkmatter_workers": "Ranks that train.",
    "darkmatter_data_wait_ratio": "Share of the time since the last row that was spent waiting for data.",
    "darkmatter_goodput_ratio": "Share of the wall time of all sessions that was spent in steps that count.",
    "darkmatter_last_row_timestamp_seconds": "When the last row was written, seconds since 1970.",
}
"""All there are. The dashboard and the alerts of infra/monitoring name no others of ours."""

_AS_THEY_ARE = (
    "step", "epoch", "images_per_second", "loss", "energy_margin", "rankme", "spread", "gradient_norm", "learning_rate",
    "skipped_not_finite", "skipped_spikes", "workers",
)  # fmt: skip
_EVERY = 5.0  # seconds; Ray forgets a number that was not set for twice its interval of ten (2.60)


@contextlib.contextmanager
def shown(
    address: str, config: PretrainConfig, *, steps: int, labels: Mapping[str, str]
) -> Iterator[Callable[[Row], None]]:
    """For rank 0: yields a function that takes each row of the history; its numbers stay until the next, or the block's end.

    Args:
        address: of the run.
        config: has the floor of the energy margin.
        steps: of the whole run.
        labels: the run's fingerprint and its method.
    """
    put = cluster.gauges(NUMBERS, labels)
    rows = history.read_all(address)
    now = {"darkmatter_steps_planned": float(steps), "darkmatter_energy_margin_floor": config.min_energy_margin}

    def show(row: Row) -> None:
        rows.append(row)
        now.update(numbers(row))

    def keep(done: threading.Event) -> None:
        measured = 0
        while not done.wait(_EVERY):
            if len(rows) > measured:  # of all rows, and most looks find no new one
                measured = len(rows)
                now["darkmatter_goodput_ratio"] = goodput.shares(rows[:measured], ended=rows[measured - 1]["time"])[
                    "step"
                ]
            put(dict(now))

    with beside(keep, "telemetry"):
        yield show


def numbers(row: Row) -> dict[str, float]:
    """What a row says of the moment."""
    seconds = sum(row[f"seconds_{cause}"] for cause in goodput.CAUSES)
    return {
        **{f"darkmatter_{name}": row[name] for name in _AS_THEY_ARE if name in row},
        "darkmatter_data_wait_ratio": row["seconds_data"] / max(seconds, 1e-9),
        "darkmatter_last_row_timestamp_seconds": row["time"],
    }
