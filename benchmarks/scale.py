"""What a run of any size takes: `make scale` writes the tables and the picture of docs/scale.md.

First the model: each number of a plan by a formula of its own. Then a simulation of what formulas leave out: machines that
wait for the slowest, caches that are cold after a failure, failures in the middle of something. Seconds and bytes.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DAY = 86400.0

#: Measured here (docs/performance.md, DECISIONS.md), of one CPU core where it is a rate.
MEASURED = {
    "bytes of a training image": 36e3,
    "bytes of a photograph": 96e3,
    "images/CPU-s, 2 + 8 views, exact": 324.0,
    "images/CPU-s, 2 + 8 views, fast": 640.0,
    "images/CPU-s, 2 + 8 views, device": 982.0,
    "second thread": 1.76,  # of `fast`, of two: 0.88 of a core each
    "sha256, bytes/s": 1.4e9,
    "packing, files/CPU-s": 6844.0,
    "ingest, seconds for 1% more, a known file": 153.9 / 1e6,
    "memory of a reader, bytes a sample": 98 * 2**20 / 1e6,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be trained, and where. What has no source is an assumption, and is called one on the page."""

    images: float
    epochs: float
    batch: int
    flops_per_image: float
    """Of all views, forward and backward, teacher included."""
    parameters: float
    """Of student and teacher together."""
    machines: int
    gpus_per_machine: int = 8
    peak_flops: float = 989e12
    """H100 SXM, bf16, dense (data sheet)."""
    utilisation: float = 0.35
    """Share of the peak that the model reaches while it computes."""
    bytes_per_image: float = MEASURED["bytes of a training image"]
    images_per_cpu_second: float = MEASURED["images/CPU-s, 2 + 8 views, fast"]
    samples_per_shard: int = 8192
    window: int = 256
    """Shards that are mixed at a time (pretrain.shuffle_shards)."""
    store_bandwidth: float = 50e9
    """Of all machines together."""
    machine_bandwidth: float = 10e9
    """Of one machine's network card, for data."""
    each_reads_all: bool = True
    """Whether every machine fetches every shard, as the cache does today, or only the part that it trains on."""
    interruptions_per_machine_day: float = 419 / (54 * 2048)
    """Llama 3: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, section 3.3.4)."""
    restart: float = 300.0
    """From the failure to the first step: notice it, a new machine, processes, weights, the first batch."""
    checkpoint_blocked: float = 2.0
    """What the loop waits for at a save; the rest is written beside it."""
    checkpoint_bandwidth: float = 1e9
    """Of rank 0, which writes it whole."""
    gpu_hour: float = 2.5
    """US dollars."""
    gibibyte_month: float = 0.023
    thousand_requests: float = 0.0004


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What a plan takes."""

    images_per_second: float
    step: float
    ideal: float
    """Seconds, if nothing ever went wrong."""
    cores_per_gpu: float
    read_per_machine: float
    read_of_store: float
    sha256_cores_per_machine: float
    data_limit: float
    """The rate of images that the network allows; below `images_per_second` it is what decides."""
    stored: float
    shards: float
    cache_per_machine: float
    checkpoint: float
    interval: float
    """Between two checkpoints (Daly)."""
    mean_time_between: float
    interruptions: float
    lost_per_interruption: float
    goodput: float
    wall: float
    dollars: float


def size(plan: Plan) -> Size:
    """The model: each line is a formula of docs/scale.md."""
    gpus = plan.machines * plan.gpus_per_machine
    compute = gpus * plan.utilisation * plan.peak_flops / plan.flops_per_image
    copies = plan.machines if plan.each_reads_all else 1
    limit = min(
        plan.store_bandwidth / (copies * plan.bytes_per_image),
        plan.machine_bandwidth / (plan.bytes_per_image / (1 if plan.each_reads_all else plan.machines)),
    )
    rate = min(compute, limit)
    ideal = plan.images * plan.epochs / compute
    between = DAY / (plan.machines * plan.interruptions_per_machine_day)
    checkpoint = plan.parameters * 4 * 3  # float32 weights and two moments; a teacher has none, so at most
    written = checkpoint / plan.checkpoint_bandwidth
    interval = max(daly(plan.checkpoint_blocked, between), written)
    goodput = efficiency(interval, plan.checkpoint_blocked, plan.restart, between) * rate / compute
    wall = ideal / goodput
    read_per_machine = rate * plan.bytes_per_image / (1 if plan.each_reads_all else plan.machines)
    stored = plan.images * plan.bytes_per_image
    shard = plan.samples_per_shard * plan.bytes_per_image
    requests = plan.epochs * copies * plan.images / plan.samples_per_shard
    dollars = wall / 3600 * gpus * plan.gpu_hour + stored / 2**30 * plan.gibibyte_month * max(1, wall / (30 * DAY))
    return Size(
        images_per_second=compute,
        step=plan.batch / compute,
        ideal=ideal,
        cores_per_gpu=compute / gpus / (plan.images_per_cpu_second * MEASURED["second thread"] / 2),
        read_per_machine=read_per_machine,
        read_of_store=read_per_machine * plan.machines,
        sha256_cores_per_machine=read_per_machine / MEASURED["sha256, bytes/s"],
        data_limit=limit,
        stored=stored,
        shards=plan.images / plan.samples_per_shard,
        cache_per_machine=2 * plan.window * shard,
        checkpoint=checkpoint,
        interval=interval,
        mean_time_between=between,
        interruptions=wall / between,
        lost_per_interruption=interval / 2 + plan.restart,
        goodput=goodput,
        wall=wall,
        dollars=dollars + requests / 1000 * plan.thousand_requests,
    )


def young(cost: float, between: float) -> float:
    """Seconds between checkpoints that cost `cost` each, when a failure comes every `between` (Young, CACM 17(9), 1974)."""
    return math.sqrt(2 * cost * between)


def daly(cost: float, between: float) -> float:
    """The same to a higher order (Daly, Future Generation Computer Systems 22(3), 2006, equation 37)."""
    if cost >= 2 * between:
        return between
    part = cost / (2 * between)
    return young(cost, between) * (1 + math.sqrt(part) / 3 + part / 9) - cost


def efficiency(interval: float, cost: float, restart: float, between: float) -> float:
    """Share of the wall time that is work which counts, with failures that come as by chance (Daly, equation 20)."""
    whole = between * math.exp(restart / between) * (math.exp((interval + cost) / between) - 1)
    return interval / whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Shares of the wall time, which add up to 1, of a simulated run."""

    wall: float
    step: float
    data: float
    save: float
    recovery: float
    """Restarts, steps that were done again, caches that were filled again."""
    failures: int


def simulate(plan: Plan, *, interval: float | None = None, seed: int = 0, jitter: float = 0.15) -> Outcome:
    """A run, window of shards by window of shards.

    While one window is trained on, each machine fetches the next; a window begins when the slowest has it. Fetches differ by
    a log-normal factor. A failure costs the steps since the last checkpoint and a restart; the machine that comes then has
    an empty cache, and all wait until it has the window.

    Args:
        plan: as for `size`.
        interval: seconds of training between checkpoints; by default Daly's.
        seed: of failures and of fetches.
        jitter: standard deviation of the logarithm of a fetch's time.
    """
    rng = np.random.default_rng(seed)
    sized = size(plan)
    interval = interval or sized.interval
    whole = min(plan.window * plan.samples_per_shard, plan.images)
    part = whole * plan.bytes_per_image / (1 if plan.each_reads_all else plan.machines)
    alone = part / plan.machine_bandwidth
    together = part / min(plan.machine_bandwidth, plan.store_bandwidth / plan.machines)
    compute = whole / sized.images_per_second
    total = plan.images * plan.epochs / whole * compute

    def fetch(seconds: float, machines: int) -> float:
        return seconds * float(np.exp(rng.normal(0.0, jitter, machines)).max())

    now = fetch(together, plan.machines)  # the first window
    spent = {"step": 0.0, "data": now, "save": 0.0, "recovery": 0.0}
    done, saved, failures = 0.0, 0.0, 0
    failure = now + rng.exponential(sized.mean_time_between)
    window_end, ready = (
        compute,
        now + fetch(together, plan.machines),
    )  # of the window: when in the work, when the next is there
    while done < total:
        stop = min(window_end, saved + interval, total)
        if now + stop - done > failure:  # in the middle of it
            failures += 1
            worked = max(0.0, failure - now)
            spent["step"] += worked
            lost = done + worked - saved
            spent["step"] -= lost
            back = plan.restart + fetch(alone, 1)
            spent["recovery"] += lost + back
            now = max(now, failure) + back
            while (again := rng.exponential(sized.mean_time_between)) < back:  # the next comes before it is over
                failures, now = failures + 1, now + again
                spent["recovery"] += again
            done, failure = saved, now + rng.exponential(sized.mean_time_between)
            window_end = min(total, (math.floor(done / compute) + 1) * compute)
            ready = max(ready, now + fetch(alone, 1))  # the new machine lacks the next one too
            continue
        now, spent["step"], done = now + stop - done, spent["step"] + stop - done, stop
        if done == saved + interval:
            saved, now = done, now + plan.checkpoint_blocked
            spent["save"] += plan.checkpoint_blocked
        if done == window_end and done < total:
            wait = max(0.0, ready - now)
            spent["data"], now = spent["data"] + wait, now + wait
            ready, window_end = now + fetch(together, plan.machines), min(total, window_end + compute)
    return Outcome(wall=now, failures=failures, **{name: value / now for name, value in spent.items()})


def vit_flops(parameters: float, *, tokens: tuple[int, int], views: tuple[int, int], teacher: int) -> float:
    """Of one image: 2 a parameter and token forward, twice that backward; the teacher sees `teacher` large views, forward.

    Attention's own products are left out: a few per cent at 200 tokens.
    """
    large, small = (2 * parameters * count for count in tokens)
    return 3 * (views[0] * large + views[1] * small) + teacher * large


#: ViT-L/16 with a teacher, 2 views of 224 and 8 of 96 pixels (DINO).
LARGE = Plan(
    images=1e9,
    epochs=10,
    batch=16384,
    flops_per_image=vit_flops(304e6, tokens=(197, 37), views=(2, 8), teacher=2),
    parameters=2 * 304e6,
    machines=64,
)


def tables() -> str:
    """The part of docs/scale.md that is made."""
    plans = {
        "1 million, 8 GPUs": dataclasses.replace(LARGE, images=1e6, epochs=100, machines=1, batch=1024),
        "100 million, 64 GPUs": dataclasses.replace(LARGE, images=1e8, machines=8, batch=4096),
        "1 billion, 512 GPUs": LARGE,
        "the same, each reads its part": dataclasses.replace(LARGE, each_reads_all=False),
    }
    return "\n".join([_sizes(plans), _simulated(plans), _limits(1e9)])


def _sizes(plans: dict[str, Plan]) -> str:
    sizes = {name: size(plan) for name, plan in plans.items()}
    rows = {
        "images/s, if nothing holds it up": lambda s, p: f"{s.images_per_second:,.0f}",
        "the network lets through, images/s": lambda s, p: f"{s.data_limit:,.0f}",
        "hours, if nothing goes wrong": lambda s, p: f"{s.ideal / 3600:,.1f}",
        "hours, expected": lambda s, p: f"{s.wall / 3600:,.1f}",
        "goodput": lambda s, p: f"{s.goodput:.1%}",
        "CPU cores a GPU, `fast`": lambda s, p: f"{s.cores_per_gpu:.1f}",
        "read by a machine, GB/s": lambda s, p: f"{s.read_per_machine / 1e9:.2f}",
        "read from the store, GB/s": lambda s, p: f"{s.read_of_store / 1e9:.1f}",
        "cores a machine for sha256": lambda s, p: f"{s.sha256_cores_per_machine:.1f}",
        "in the store, TB": lambda s, p: f"{s.stored / 1e12:.2f}",
        "shards": lambda s, p: f"{s.shards:,.0f}",
        "cache a machine, GB": lambda s, p: f"{min(s.cache_per_machine, s.stored) / 1e9:.0f}",
        "a checkpoint, GB": lambda s, p: f"{s.checkpoint / 1e9:.1f}",
        "days between interruptions": lambda s, p: f"{s.mean_time_between / DAY:,.1f}",
        "interruptions expected": lambda s, p: f"{s.interruptions:.2f}",
        "minutes between checkpoints (Daly)": lambda s, p: f"{s.interval / 60:.0f}",
        "minutes lost to an interruption": lambda s, p: f"{s.lost_per_interruption / 60:.0f}",
        "US dollars": lambda s, p: f"{s.dollars:,.0f}",
    }
    lines = [f"| | {' | '.join(plans)} |", f"| --- |{' --- |' * len(plans)}"]
    lines += [f"| {what} | {' | '.join(show(sizes[n], p) for n, p in plans.items())} |" for what, show in rows.items()]
    return "\n".join(lines) + "\n"


def _simulated(plans: dict[str, Plan]) -> str:
    large = plans["1 billion, 512 GPUs"]
    cases = {
        "each machine reads all, store 50 GB/s": large,
        "each machine reads all, store 400 GB/s": dataclasses.replace(large, store_bandwidth=400e9),
        "each reads its part, store 50 GB/s": dataclasses.replace(large, each_reads_all=False),
        "each reads its part, store 5 GB/s": dataclasses.replace(large, each_reads_all=False, store_bandwidth=5e9),
        "its part, spot machines (1 in 4 taken a day)": dataclasses.replace(
            large, each_reads_all=False, interruptions_per_machine_day=0.25
        ),
    }
    lines = [
        "| 1 billion, 512 GPUs; mean of 20 runs | hours | goodput | by the model | data | save | recovery | failures |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, plan in cases.items():
        runs = [simulate(plan, seed=seed) for seed in range(20)]
        mean = {key: float(np.mean([getattr(run, key) for run in runs])) for key in vars(runs[0])}
        lines.append(
            f"| {name} | {mean['wall'] / 3600:.1f} | {mean['step']:.1%} | {size(plan).goodput:.1%} | {mean['data']:.1%} | "
            f"{mean['save']:.1%} | {mean['recovery']:.1%} | {mean['failures']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _limits(images: float) -> str:
    """What was measured here with a million, if it went on in proportion."""
    night = images * MEASURED["ingest, seconds for 1% more, a known file"]
    index = images * MEASURED["memory of a reader, bytes a sample"]
    rate = MEASURED["packing, files/CPU-s"]
    return "\n".join([
        "| with a million, measured | with a billion, in proportion |",
        "| --- | --- |",
        f"| ingest of 1% more files: 154 s, most of it for what is known | {night / 3600:.0f} hours a night |",
        f"| a reader adds 98 MiB to each process | {index / 1e9:.0f} GB for each rank |",
        f"| packing: {rate:,.0f} files a CPU second | {images / rate / 3600:.0f} CPU hours, once, on all machines |",
    ]) + "\n"  # fmt: skip


def draw(path: Path) -> None:
    """What the store must give, and what a checkpoint's interval decides."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    bandwidths = np.geomspace(1e9, 1e12, 25)
    for label, all_of_it in (("each machine reads all (today)", True), ("each reads its part", False)):
        plans = [dataclasses.replace(LARGE, store_bandwidth=b, each_reads_all=all_of_it) for b in bandwidths]
        left.plot(bandwidths / 1e9, [100 * simulate(plan).data for plan in plans], label=label)
    left.set(
        xscale="log",
        xlabel="store, GB/s of all machines together",
        ylabel="% of the time waiting for data",
        ylim=(0, 100),
    )
    left.set_title("1 billion images, 512 GPUs")
    spot = dataclasses.replace(LARGE, each_reads_all=False, interruptions_per_machine_day=0.25)
    intervals = np.geomspace(30, 3 * 3600, 20)
    sized = size(spot)
    goodput = [[simulate(spot, interval=i, seed=seed).step for seed in range(10)] for i in intervals]
    right.errorbar(
        intervals / 60,
        100 * np.mean(goodput, 1),
        100 * np.std(goodput, 1),
        fmt="o",
        markersize=4,
        label="simulated, 10 runs",
    )
    model = [efficiency(i, spot.checkpoint_blocked, spot.restart, sized.mean_time_between) for i in intervals]
    right.plot(intervals / 60, 100 * np.array(model), label="Daly's formula")
    right.axvline(sized.interval / 60, color="grey", linestyle=":", label=f"his best, {sized.interval / 60:.0f} min")
    right.set(
        xscale="log", xlabel="minutes between checkpoints", ylabel="goodput, %", title="on spot machines, 16 lost a day"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def page(text: str) -> str:
    """docs/scale.md with its tables made new."""
    return re.sub(r"(<!-- begin -->\n).*(<!-- end -->)", lambda m: f"{m[1]}\n{tables()}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    target = HERE.parent / "docs" / "scale.md"
    target.write_text(page(target.read_text()))
    draw(HERE.parent / "docs" / "scale.png")
