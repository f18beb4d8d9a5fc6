"""What snapshots cost: depth, creation under load, deletion, cloning.

    python -m perf.snapshots depth    IOPS and opening time with 1, 16, 64 and 254 snapshots
    python -m perf.snapshots create   the longest wait of a writer around each of 100 snapshots
    python -m perf.snapshots delete   how long it takes, and the space before and after
    python -m perf.snapshots clone    how long it takes until it is there, and until it serves

Real daemons below --directory, one replica, on unix sockets; everything is removed again. fio is
the client.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from bisect import bisect_left
from pathlib import Path

from perf.recovery import MIB, Volume, fio, run, write
from protocol.units import parse_size

DEPTHS = (1, 16, 64, 254)
PAUSES = 100  # snapshots of `create`
WINDOW_SECONDS = 0.02  # after a snapshot: its writers are answered by then


def depth(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    size = parse_size(options.written)
    write(volume, 0, size)
    made = 0
    print(f"{'snapshots':>9}  {'read IOPS':>9}  {'write IOPS':>10}  {'open s':>6}")
    for wanted in DEPTHS:
        while made < wanted:
            made += 1
            volume.ask("snapshot-create", name=f"s{made}")
            fio(
                volume.uri, "--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={size}",
                f"--io_size={options.changed}", f"--randseed={made}",
            )  # fmt: skip
        rates = {
            way: statistics.median(_iops(volume, way, size) for _ in range(options.rounds))
            for way in ("randread", "randwrite")
        }
        volume.end()
        begin = time.monotonic()
        volume.start()
        volume.until_ready()
        opened = time.monotonic() - begin
        print(
            f"{wanted:>9}  {rates['randread']:>9.0f}  {rates['randwrite']:>10.0f}  {opened:>6.2f}"
        )


def _iops(volume: Volume, way: str, size: int) -> float:
    job = fio(
        volume.uri, f"--rw={way}", "--bs=4k", "--iodepth=16", f"--size={size}", "--time_based",
        "--runtime=3", "--norandommap",
    )  # fmt: skip
    return float(job["read" if way == "randread" else "write"]["iops"])


def create(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    size = parse_size(options.written)
    write(volume, 0, size)
    log = volume.directory / "load"
    load = subprocess.Popen(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri={volume.uri}", "--rw=randwrite", "--bs=4k",
         "--iodepth=16", f"--size={size}", "--time_based", "--runtime=3600", "--norandommap",
         f"--write_lat_log={log}", "--log_unix_epoch=1"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(2)
    windows: list[tuple[float, float]] = []
    taken = []
    for number in range(PAUSES):
        time.sleep(0.1)
        begin = time.time()
        volume.ask("snapshot-create", name=f"s{number}")
        taken.append(1000 * (time.time() - begin))
        windows.append((begin, time.time() + WINDOW_SECONDS))
    load.send_signal(2)
    load.wait()
    lines = Path(f"{log}_clat.1.log").read_text().splitlines()
    waits = [(int(at) / 1000, int(ns) / 1e6) for at, ns, *_ in (line.split(",") for line in lines)]
    waits.sort()

    def longest(begin: float, end: float) -> float:
        part = waits[bisect_left(waits, (begin,)) : bisect_left(waits, (end,))]
        return max((ms for _, ms in part), default=0.0)

    length = statistics.mean(b - a for a, b in windows)
    around = [longest(a, b) for a, b in windows]
    between = [longest(b, b + length) for _, b in windows]
    for what, found in (
        ("longest write around a snapshot", around),
        ("longest write in as long a time without one", between),
        ("the command", taken),
    ):
        found.sort()
        print(f"create: {what}: p50 {found[len(found) // 2]:.2f} ms, p99 {found[-2]:.2f} ms")


def delete(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    size = parse_size(options.written)
    write(volume, 0, size)
    for name, changed in (("large", size), ("small", 4 * MIB)):
        volume.ask("snapshot-create", name=name)
        write(volume, 0, changed)
    for name in ("small", "large"):
        before = _space(volume)
        begin = time.monotonic()
        volume.ask("snapshot-remove", name=name)
        answered = time.monotonic() - begin
        layers = 1 + len(volume.ask("status")["snapshots"])
        files = volume.directory / "r0" / "layers"
        volume.until(lambda: len(list(files.glob("*.layer"))) == layers, "it is folded")  # noqa: B023
        print(
            f"delete: the {name} one: answered after {1000 * answered:.1f} ms, folded after "
            f"{time.monotonic() - begin:.1f} s: {before} MiB before, {_space(volume)} MiB after"
        )


def clone(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    write(volume, 0, parse_size(options.written))
    volume.ask("snapshot-create", name="s")
    status = volume.ask("status")
    made = Volume(volume.directory / "clone", 1, options.size)
    made.directory.mkdir()
    begin = time.monotonic()
    volume.ask(
        "clone",
        snapshot="s",
        volume_uuid="",
        volume_name="v",
        size_bytes=status["size_bytes"],
        targets={status["members"][0]["replica_uuid"]: ("clone", str(made.directory / "r0"))},
        unshare=False,
    )
    answered = time.monotonic() - begin
    times = []
    for _ in range(2):
        begin = time.monotonic()
        made.start()
        made.until_ready()
        times.append(time.monotonic() - begin)
        made.end()
    print(
        f"clone: answered after {1000 * answered:.1f} ms, its daemons serve {times[0]:.2f} s after "
        f"their first start, {times[1]:.2f} s after the second; {_space(volume)} MiB before, "
        f"{_space(volume, '.')} MiB with the clone"
    )


def _space(volume: Volume, part: str = "r0") -> int:
    done = subprocess.run(
        ["du", "-sm", str(volume.directory / part)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[0])


SCENARIOS = {"depth": depth, "create": create, "delete": delete, "clone": clone}


def main() -> None:
    """Run one scenario."""
    parse = argparse.ArgumentParser(prog="python -m perf.snapshots", description=__doc__)
    parse.add_argument("scenario", choices=SCENARIOS)
    parse.add_argument("--directory", default=tempfile.gettempdir())
    parse.add_argument("--size", default="4G", help="size of the volume (4G)")
    parse.add_argument("--written", default="1G", help="how much data the volume has (1G)")
    parse.add_argument("--changed", default="4M", help="depth: written between snapshots (4M)")
    parse.add_argument("--rounds", type=int, default=3, help="depth: medians of so many (3)")
    options = parse.parse_args()
    run(SCENARIOS[options.scenario], 1, options.size, options)


if __name__ == "__main__":
    main()
