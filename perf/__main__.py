"""The same fio job against blockd and its peers, in turn, in one run; prints medians and ratios.

    python -m perf [--rounds 3] [--seconds 3] [--size 1G] [--json FILE]

Servers: the file plugin of nbdkit and qemu-nbd (raw) on one sparse file, blockd with one replica
and with three. All of them serve one unix socket to one fio connection, 4 KiB random, data in the
page cache; blockd's replicas are processes of their own and every block is checksummed. Servers
take turns round by round, so a machine whose speed drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

JOBS = [("randread", 1), ("randread", 16), ("randwrite", 1), ("randwrite", 16)]
GOALS = {  # least ratio to nbdkit at QD16
    ("blockd-local", "randread", 16): 1.0,
    ("blockd-local", "randwrite", 16): 0.8,
    ("blockd-3", "randread", 16): 0.4,
    ("blockd-3", "randwrite", 16): 0.2,
}
START_SECONDS = 20.0


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A server process in a session of its own, its output in `log`."""
    with open(log, "ab") as out:
        return subprocess.Popen(arguments, stdout=out, stderr=out, start_new_session=True)


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server's socket is there."""
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"perf: {process.args} did not start:\n{log.read_text()}")
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and wait."""
    process.send_signal(signal.SIGTERM)
    process.wait(START_SECONDS)


@contextmanager
def nbdkit(directory: Path, image: Path) -> Iterator[str]:
    """nbdkit's file plugin."""
    sock = directory / "nbdkit.sock"
    process = start(["nbdkit", "-f", "-U", str(sock), "file", str(image)], directory / "log")
    wait_for(sock, process, directory / "log")
    yield f"nbd+unix:///?socket={sock}"
    end(process)
    sock.unlink(missing_ok=True)


@contextmanager
def qemu(directory: Path, image: Path) -> Iterator[str]:
    """qemu-nbd on a raw file."""
    sock = directory / "qemu.sock"
    process = start(
        ["qemu-nbd", "-t", "-f", "raw", "--cache=writeback", "-k", str(sock), str(image)],
        directory / "log",
    )
    wait_for(sock, process, directory / "log")
    yield f"nbd+unix:///?socket={sock}"
    end(process)
    sock.unlink(missing_ok=True)


@contextmanager
def blockd(directory: Path, replicas: int, size: str, transport: str) -> Iterator[str]:
    """A volume daemon and its replica daemons; the directory keeps the data between rounds."""
    home = directory / f"blockd{replicas}"
    home.mkdir(exist_ok=True)
    log = home / "log"
    base = [sys.executable, "-m", "blockd", "daemon"]
    processes = []
    addresses = []
    for number in range(replicas):
        sock = home / f"r{number}.sock"
        where = f"unix:{sock}" if transport == "unix" else f"127.0.0.1:{19600 + number}"
        addresses.append(where)
        replica = ["replica", str(home / f"r{number}"), "--listen", where]
        process = start([*base, *replica, "--create", "--size", size], log)
        if transport == "unix":
            wait_for(sock, process, log)
        processes.append(process)
    sock = home / "nbd.sock"
    named = [word for where in addresses for word in ("--replica", where)]
    volume = ["volume", "v", *named, "--nbd", f"unix:{sock}", "--state", str(home / "state.db")]
    process = start([*base, *volume], log)
    wait_for(sock, process, log)
    yield f"nbd+unix:///v?socket={sock}"
    for running in [process, *processes]:
        end(running)


@contextmanager
def blockd_local(directory: Path, size: str) -> Iterator[str]:
    """A volume daemon with its only replica in a directory of its own."""
    home = directory / "blockd-local"
    log = directory / "log"
    if not home.exists():
        home.mkdir()
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from protocol.units import parse_size; "
                "from snapshots.replica import Replica; Replica.create(sys.argv[1], "
                "size_bytes=parse_size(sys.argv[2]), replica_uuid='perf')",
                str(home / "r"),
                size,
            ],
            check=True,
        )
    sock = home / "nbd.sock"
    volume = ["volume", "v", "--replica", f"dir:{home}/r", "--nbd", f"unix:{sock}"]
    state = ["--state", str(home / "state.db")]
    process = start([sys.executable, "-m", "blockd", "daemon", *volume, *state], log)
    wait_for(sock, process, log)
    yield f"nbd+unix:///v?socket={sock}"
    end(process)


def warm(directory: Path) -> None:
    """Read all files: some kernels give cold page cache back early, and the condition is that
    the data is in memory, on every replica."""
    buffer = bytearray(4 << 20)
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                end = 0
                while True:  # holes take no time and no memory
                    try:
                        start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                    except OSError:  # ENXIO: only a hole is left
                        break
                    end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                    for at in range(start, end, len(buffer)):
                        os.preadv(file.fileno(), [buffer], at)


def fio(uri: str, kind: str, depth: int, seconds: float, size: str, out: Path) -> dict[str, Any]:
    """One fio run: iops, mean and 99th percentile latency in microseconds."""
    subprocess.run(
        [
            "fio",
            "--name=job",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--rw={kind}",
            f"--bs={'4k' if kind.startswith('rand') else '1M'}",
            f"--iodepth={depth}",
            f"--size={size}",
            *([f"--runtime={seconds}", "--time_based"] if seconds else []),
            "--output-format=json",
            f"--output={out}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    job = json.loads(out.read_text())["jobs"][0]
    side = job["read" if kind.endswith("read") else "write"]
    return {
        "iops": side["iops"],
        "mean_us": side["lat_ns"]["mean"] / 1000,
        "p99_us": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
    }


def measure(options: argparse.Namespace, directory: Path) -> dict[str, list[dict[str, Any]]]:
    """All rounds; results by "server kind depth"."""
    image = directory / "image"
    subprocess.run(["truncate", "-s", options.size, str(image)], check=True)
    results: dict[str, list[dict[str, Any]]] = {}
    makers = {
        "nbdkit": lambda: nbdkit(directory, image),
        "qemu-nbd": lambda: qemu(directory, image),
        "blockd-1": lambda: blockd(directory, 1, options.size, options.transport),
        "blockd-local": lambda: blockd_local(directory, options.size),
        "blockd-3": lambda: blockd(directory, 3, options.size, options.transport),
    }
    servers = {name: makers[name] for name in options.servers.split(",")}
    for turn in range(options.rounds + 1):
        for name, maker in servers.items():
            with ExitStack() as stack:
                uri = stack.enter_context(maker())
                if turn == 0:  # fill it, so that every read meets data in the page cache
                    fio(uri, "write", 4, 0, options.size, directory / "fio.json")
                    os.sync()  # or writing it back would compete with the first round
                    continue
                warm(directory)
                for kind, depth in JOBS:
                    result = fio(
                        uri, kind, depth, options.seconds, options.size, directory / "fio.json"
                    )
                    results.setdefault(f"{name} {kind} {depth}", []).append(result)
        print(f"round {turn} of {options.rounds} done", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list[dict[str, Any]]], servers: list[str]) -> list[str]:
    """Medians per server, and their ratio to nbdkit."""
    lines = ["| server | " + " | ".join(f"{kind} QD{depth}" for kind, depth in JOBS) + " |"]
    lines.append("|---" * (len(JOBS) + 1) + "|")
    for name in servers:
        cells = []
        for kind, depth in JOBS:
            iops = statistics.median(r["iops"] for r in results[f"{name} {kind} {depth}"])
            cell = f"{iops / 1000:.1f} k"
            if "nbdkit" in servers and name != "nbdkit":
                peer = statistics.median(r["iops"] for r in results[f"nbdkit {kind} {depth}"])
                goal = GOALS.get((name, kind, depth))
                cell += f" ({iops / peer:.2f} x" + (f", goal {goal})" if goal else ")")
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Run and print; exit 1 if a tool is missing."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--seconds", type=float, default=3)
    parse.add_argument("--size", default="1G")
    parse.add_argument("--transport", choices=("tcp", "unix"), default="unix")
    parse.add_argument("--servers", default="nbdkit,qemu-nbd,blockd-local,blockd-1,blockd-3")
    parse.add_argument("--directory", help="where the data goes (default: a temporary directory)")
    parse.add_argument("--json", help="also write all results here")
    options = parse.parse_args()
    for tool, package in (("fio", "fio"), ("nbdkit", "nbdkit"), ("qemu-nbd", "qemu-utils")):
        if shutil.which(tool) is None:
            print(f"perf: {tool} is missing; install the Debian package {package}")
            return 1
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        results = measure(options, Path(directory))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, median of {options.rounds} rounds of "
        f"{options.seconds:g} s, {options.size} volume, replicas over {options.transport}"
    )
    print("\n".join(table(results, options.servers.split(","))))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
