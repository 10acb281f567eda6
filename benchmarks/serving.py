"""What HTTP costs, and whether the programs of a version are as fast as the network they were made from.

    make bench-serving        # some minutes on two cores; writes into docs/performance.md

The version is the champion of this folder's registry, or --model. The server is `mlflow models serve` with one worker on
this machine; beside it the same version is called in this process, with the same files, in turns. A client waits for each
answer before it asks again; several do so at the same time. The model has one thread everywhere.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import datetime
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
import torch

from darkmatter import model, registry, tracking
from darkmatter.registry import package
from darkmatter.sources import builtin
from data import PAGE, replace_section

BATCHES, CLIENTS = (1, 16, 64), (1, 4)
START = 180.0  # seconds that a server may take


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, float]]:
    """Its address, and how long it took until it answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "models",
        "serve",
        "--model-uri",
        str(folder),
        "--env-manager",
        "local",
        "--workers",
        "1",
        "--port",
        str(port),
    ]
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").close()
                    break
                if process.poll() is not None or time.monotonic() - start > START:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read().decode()}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/invocations", time.monotonic() - start
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def over_http(address: str, contents: list[bytes]) -> int:
    records = [{"image": base64.b64encode(one).decode()} for one in contents]
    body = json.dumps({"dataframe_records": records}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return len(json.load(answer)["predictions"])


def seconds(call: Callable[[list[bytes]], object], batches: list[list[bytes]]) -> list[float]:
    """Of each call."""
    found = []
    for batch in batches:
        start = time.perf_counter()
        call(batch)
        found.append(time.perf_counter() - start)
    return found


def measure(address: str, loaded: Any, contents: list[bytes], rounds: int, calls: int) -> list[str]:
    def in_process(batch: list[bytes]) -> object:
        return loaded.predict(pandas.DataFrame({"image": batch}))

    def http(batch: list[bytes]) -> object:
        return over_http(address, batch)

    lines = [
        "| images a request | clients | p50, ms | p95, ms | images/s | in process, p50, ms | images/s, of in process |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in BATCHES:
        batches = [[contents[(n * size + k) % len(contents)] for k in range(size)] for n in range(calls)]
        seconds(http, batches[:2])
        for clients in CLIENTS:
            waits: list[float] = []
            alone: list[float] = []
            ratios, speeds = [], []
            for _ in range(rounds):
                ours = seconds(in_process, batches)
                start = time.perf_counter()
                with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                    shares = [batches[one::clients] for one in range(clients)]
                    waits += [one for some in pool.map(lambda share: seconds(http, share), shares) for one in some]
                speed = calls * size / (time.perf_counter() - start)
                alone += ours
                speeds.append(speed)
                ratios.append(speed / (calls * size / sum(ours)))
            low, high = min(ratios), max(ratios)
            lines.append(
                f"| {size} | {clients} | {1000 * statistics.median(waits):.1f} | {1000 * np.quantile(waits, 0.95):.1f} | "
                f"{statistics.median(speeds):.0f} | {1000 * statistics.median(alone):.1f} | "
                f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
            )
            print(lines[-1], flush=True)
    return lines


def programs(folder: Path, contents: list[bytes], rounds: int) -> list[str]:
    """Eager, torch.export and ONNX on images that were decoded already."""
    import onnxruntime

    inside = folder / "artifacts" / "version"
    objective, spec, _ = model.load(inside / "model")
    exported = torch.export.load(inside / "embedding.pt2").module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(inside / "embedding.onnx", options, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "eager": objective.backbone.both,
        "torch.export": exported,
        "ONNX": lambda images: session.run(None, {name: images.numpy()}),
    }
    lines = ["| images at once | | images/s | ratio to eager | of all rounds |", "| --- | --- | --- | --- | --- |"]
    for size in BATCHES:
        images = package.as_seen([contents[one % len(contents)] for one in range(size)], spec)
        times: dict[str, list[float]] = {way: [] for way in ways}
        repeats = max(2, 64 // size)
        with torch.no_grad():
            for number in range(rounds + 1):  # the first warms up
                for way, call in ways.items():
                    start = time.perf_counter()
                    for _ in range(repeats):
                        call(images)
                    if number:
                        times[way].append((time.perf_counter() - start) / repeats)
        for way, found in times.items():
            ratios = [eager / one for eager, one in zip(times["eager"], found, strict=True)]
            lines.append(
                f"| {size} | {way} | {size / statistics.median(found):,.0f} | {statistics.median(ratios):.2f} | "
                f"{min(ratios):.2f} to {max(ratios):.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models:/darkmatter-backbone@champion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=32, help="requests a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mlflow.set_tracking_uri(tracking.uri_of("sqlite:///mlflow.db"))
    source = builtin.open_source("mnist")
    contents = list(source.read(list(source.items())[::40], limit=100_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "version"
        start = time.monotonic()
        registry.fetch(arguments.model, folder)
        fetched = time.monotonic() - start
        start = time.monotonic()
        loaded = mlflow.pyfunc.load_model(str(folder))
        opened = time.monotonic() - start
        exact = programs(folder, contents, arguments.rounds)
        with server(folder) as (address, up):
            lines = measure(address, loaded, contents, arguments.rounds, arguments.calls)
        spec = json.loads((folder / "artifacts/version/model/config.json").read_text())
    network = spec["backbone"].get(spec["backbone"]["name"], {})
    about = (
        f"`make bench-serving`, {datetime.date.today()}, torch {torch.__version__}, mlflow {mlflow.__version__}, "
        f"{os.cpu_count()} cores, no GPU, load {os.getloadavg()[0]:.0f}: {spec['backbone']['name']} {network}, PNGs of "
        f"28 x 28 pixels, {arguments.rounds} rounds in turns of {arguments.calls} requests. "
    )
    loading = (
        f"A verified copy took {fetched:.1f} s, loading it {opened:.1f} s, the server {up:.0f} s until it answered."
    )
    replace_section(PAGE, "## A version over HTTP", [about + loading, "", *lines])
    eager = "The same run: the network on images that were decoded already, features and mean of patches, one thread."
    replace_section(PAGE, "## The programs of a version", [eager, "", *exact])


if __name__ == "__main__":
    main()
