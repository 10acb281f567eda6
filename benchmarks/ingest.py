"""What an ingest takes as the data grows: time, and memory, which must not grow with it.

    python benchmarks/ingest.py --files 1000 200000 1000000      # writes into docs/performance.md

Files are PNGs of 8 x 8 random pixels in folders of a thousand. A second ingest follows after 1% new files have come.
"""

import argparse
import datetime
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import psutil

from darkmatter import cluster, ingest
from darkmatter.sources import SourceConfig

CONFIG = ingest.IngestConfig(
    samples_per_shard=2048, val_fraction=0.02, test_fraction=0.02, max_pixels=10**7, max_file_mebibytes=64,
    max_decode_seconds=60.0, max_decode_mebibytes=2048, near_duplicates=-1, drop_removed=False,
)  # fmt: skip


def write_files(folder: Path, start: int, stop: int) -> None:
    for number in range(start, stop):
        place = folder / f"{number // 1000:05d}"
        if number == start or not number % 1000:
            place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}.png").write_bytes(png(number))


def png(seed: int) -> bytes:
    pixels = random.Random(seed)
    rows = b"".join(b"\0" + pixels.randbytes(8 * 3) for _ in range(8))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def once(source: Path, out: Path) -> None:
    """In a process of its own; prints seconds, the peak of this process and that of its largest worker, in MiB."""
    largest = [0]
    threading.Thread(target=watch, args=(largest,), daemon=True).start()
    with cluster.session():
        started = time.monotonic()
        counts = ingest.ingest(SourceConfig(uri=f"folder:{source}", labels=False), CONFIG, out=out)
        seconds = time.monotonic() - started
    # Not getrusage: its peak survives exec, so that it would be that of the process which started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = int(status["VmHWM"].split()[0]) / 1024
    print("RESULT", seconds, own, largest[0] / 2**20, counts["samples"])


def watch(largest: list[int]) -> None:
    me = psutil.Process()
    while True:
        for process in me.children(recursive=True):
            try:
                if "ray::_inspect" in process.name() or "ray::" in " ".join(process.cmdline()[:1]):
                    largest[0] = max(largest[0], process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.5)


def measure(source: Path, out: Path) -> tuple[float, float, float, int]:
    command = [sys.executable, __file__, "--once", str(source), str(out)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, own, worker, samples = next(row for row in answer.splitlines() if row.startswith("RESULT")).split()[1:]
    return float(seconds), float(own), float(worker), int(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 200_000])
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        once(*arguments.once)
        return
    from data import PAGE, replace_section  # it imports torch, which is none of the memory that is measured

    lines = [
        "| files | seconds | files/s | driver, MiB | largest worker, MiB | with 1% more, seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count in arguments.files:
        with tempfile.TemporaryDirectory() as name:
            source, out = Path(name) / "files", Path(name) / "shards"
            write_files(source, 0, count)
            seconds, own, worker, samples = measure(source, out)
            if samples != count:
                raise RuntimeError(f"{count} files became {samples} samples")
            write_files(source, count, count + count // 100)
            more, *_ = measure(source, out)
        lines.append(
            f"| {count:,} | {seconds:,.0f} | {count / seconds:,.0f} | {own:.0f} | {worker:.0f} | {more:,.1f} |"
        )
        print(lines[-1], flush=True)
    about = (
        f"`benchmarks/ingest.py`, {datetime.date.today()}, {os.cpu_count()} cores: PNGs of 8 x 8 pixels, each read, "
        "decoded in a guarded process, hashed and packed; then again after 1% new files."
    )
    replace_section(PAGE, "## Ingest as the data grows", [about, "", *lines])


if __name__ == "__main__":
    main()
