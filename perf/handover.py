"""The pause of clients while a volume daemon hands over to its successor, again and again.

    python -m perf.handover [--count 100] [--replicas 3]

Real daemons below --directory; fio writes and reads at random on one NBD connection meanwhile and
must see no error. The longest answer is that of the whole run; the same without hand-overs stands
beside it, because a shared machine has pauses of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from perf.recovery import Volume, write

SIZE = "256M"


def load(volume: Volume, depth: int, seconds: float, report: Path) -> subprocess.Popen[bytes]:
    """fio in the background."""
    words = [
        "fio", "--name=job", "--ioengine=nbd", f"--uri={volume.uri}", "--rw=randrw", "--bs=4k",
        f"--iodepth={depth}", f"--size={SIZE}", "--time_based", f"--runtime={seconds:.0f}",
        "--output-format=json", f"--output={report}",
    ]  # fmt: skip
    return subprocess.Popen(words)


def longest(report: Path) -> tuple[int, float, float]:
    """Of a report: answers per second, the longest one and the 99.99th percentile in ms."""
    text = report.read_text()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        sys.exit(f"perf: fio saw error {job['error']}")
    parts = [job["read"], job["write"]]
    worst = max(part["clat_ns"]["max"] for part in parts) / 1e6
    tail = max(part["clat_ns"]["percentile"]["99.990000"] for part in parts) / 1e6
    return round(sum(part["iops"] for part in parts)), worst, tail


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m perf.handover", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--directory", help="where the data goes (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        volume = Volume(Path(directory), options.replicas, SIZE)
        volume.start()
        volume.until_ready()
        try:
            measure(volume, options)
        finally:
            volume.end()


def measure(volume: Volume, options: argparse.Namespace) -> None:
    """One run with hand-overs, one of the same length without."""
    report = volume.directory / "fio.json"
    write(volume, 0, 256 << 20)
    client = load(volume, options.depth, 3600, report)
    time.sleep(1)
    begin = time.monotonic()
    for _ in range(options.count):
        volume.replace()
    seconds = time.monotonic() - begin
    client.terminate()
    client.wait()
    with_them = longest(report)
    load(volume, options.depth, seconds, report).wait()
    for what, (rate, worst, tail) in (
        (f"{options.count} hand-overs in {seconds:.0f} s", with_them),
        ("the same time without", longest(report)),
    ):
        print(
            f"{what}: no error, longest answer {worst:.1f} ms, 99.99 % {tail:.1f} ms, {rate} IOPS"
        )


if __name__ == "__main__":
    main()
