"""How long volumes take to come back, and what that costs: crash, absence, loss and rebuild.

    python -m perf.recovery crash     all daemons killed: seconds until the volume is readable
    python -m perf.recovery absence   a member was away: bytes copied to make it equal
    python -m perf.recovery lost      a replica daemon is killed: the longest pause of a writer
    python -m perf.recovery rebuild   an empty member: speed next to dd, and what users feel

Each starts real daemons below --directory and removes everything again. fio is the client.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from perf.__main__ import START_SECONDS, start
from protocol.units import parse_size

MIB = 1 << 20
POLL_SECONDS = 0.01
WAIT_SECONDS = 1800.0


class Volume:
    """A volume daemon and its replica daemons, all on unix sockets."""

    def __init__(self, directory: Path, replicas: int, size: str) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.nbd = directory / "nbd.sock"
        self.uri = f"nbd+unix:///v?socket={self.nbd}"
        self.count = replicas
        self.size = size
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """All daemons at once, as after a reboot."""
        for number in range(self.count):
            self.start_replica(number)
        self.start_volume()

    def start_replica(self, number: int, replica_uuid: str = "") -> None:
        """One replica daemon; the uuid is that of a directory made anew."""
        words = ["replica", str(self.directory / f"r{number}"), "--listen", self._address(number)]
        words += ["--create", "--size", self.size, "--replica-uuid", replica_uuid]
        self._start(f"r{number}", words)

    def start_volume(self) -> None:
        """The volume daemon."""
        self.nbd.unlink(missing_ok=True)
        self._start("volume", self._volume_words())

    def replace(self) -> None:
        """A successor takes over from the volume daemon."""
        old = self.processes["volume"]
        self._start("volume", [*self._volume_words(), "--take-over"])
        old.wait(START_SECONDS)

    def _volume_words(self) -> list[str]:
        named = [word for n in range(self.count) for word in ("--replica", self._address(n))]
        words = ["volume", "v", *named, "--nbd", f"unix:{self.nbd}"]
        words += ["--state", str(self.directory / "state.db")]
        return [*words, "--control", f"unix:{self.directory}/control"]

    def _address(self, number: int) -> str:
        return f"unix:{self.directory}/r{number}.sock"

    def _start(self, name: str, words: list[str]) -> None:
        command = [sys.executable, "-m", "blockd", "daemon", *words]
        self.processes[name] = start(command, self.log)

    def kill(self, *names: str) -> None:
        """kill -9, of all if none is named."""
        for name in names or list(self.processes):
            process = self.processes.pop(name)
            process.send_signal(signal.SIGKILL)
            process.wait()

    def end(self) -> None:
        """Stop what runs."""
        for name in ["volume", *sorted(self.processes.keys() - {"volume"})]:
            process = self.processes.pop(name, None)
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.wait(START_SECONDS)

    def ask(self, command: str, **content: Any) -> dict[str, Any]:
        """One command to the volume daemon."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.directory / "control"))
            sock.sendall(json.dumps({"command": command, **content}).encode() + b"\n")
            with sock.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
        if not answer["ok"]:
            sys.exit(f"perf: {command}: {answer}")
        return answer

    def states(self) -> list[str]:
        """The member states."""
        return sorted(member["state"] for member in self.ask("status")["members"])

    def until_ready(self) -> None:
        """Until an NBD client can read."""
        self.until(lambda: subprocess.run(
            ["nbdinfo", "--size", self.uri], capture_output=True, check=False
        ).returncode == 0, "the volume is served")  # fmt: skip

    def until_in_sync(self) -> None:
        """Until all members are equal."""
        self.until(lambda: self.states() == ["IN_SYNC"] * self.count, "all members are in sync")

    def until(self, wanted: Callable[[], bool], what: str) -> None:
        """Poll until something is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not wanted():
            if time.monotonic() > deadline:
                sys.exit(f"perf: not within {WAIT_SECONDS:g} s: {what}\n{self.log.read_text()}")
            time.sleep(POLL_SECONDS)


def fio(uri: str, *words: str) -> dict[str, Any]:
    """One fio job; its result."""
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
    done = subprocess.run([*command, *words], check=True, stdout=subprocess.PIPE)
    text = done.stdout.decode()
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    return job


def write(volume: Volume, offset: int, size: int) -> None:
    """Sequential data, incompressible."""
    fio(
        volume.uri, "--rw=write", "--bs=1M", "--iodepth=8", "--end_fsync=1", "--refill_buffers",
        f"--offset={offset}", f"--size={size}",
    )  # fmt: skip


def crash(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    random, total = Random(1), parse_size(options.written)
    size, pieces = parse_size(volume.size), options.snapshots
    piece = total // pieces // MIB * MIB
    for number in range(pieces):
        write(volume, random.randrange((size - piece) // piece) * piece, piece)
        volume.ask("snapshot-create", name=f"s{number}")
    load = subprocess.Popen(
        ["fio", "--name=x", "--ioengine=nbd", f"--uri={volume.uri}", "--rw=randwrite", "--bs=4k",
         "--iodepth=16", f"--size={size}", "--time_based", "--runtime=60", "--norandommap"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(5)
    volume.kill()
    load.wait()
    if options.cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    begin = time.monotonic()
    volume.start()
    volume.until_ready()
    fio(volume.uri, "--rw=read", "--bs=4k", "--size=4k")
    readable = time.monotonic() - begin
    volume.until_in_sync()
    print(
        f"crash: {volume.size} volume, {options.written} written, {pieces} snapshots, "
        f"{volume.count} replicas{', cold' if options.cold else ''}: readable after "
        f"{readable:.2f} s, all members equal after {time.monotonic() - begin:.2f} s"
    )


def absence(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    write(volume, 0, parse_size(options.written))
    volume.kill("r0")
    fio(volume.uri, "--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={options.written}",
        f"--io_size={options.changed}", "--end_fsync=1", "--refill_buffers")  # fmt: skip
    begin = time.monotonic()
    volume.start_replica(0)
    volume.until_in_sync()
    seconds = time.monotonic() - begin
    copied = int(re.findall(r"in sync, (\d+) MiB copied", volume.log.read_text())[-1])
    changed = parse_size(options.changed)
    print(
        f"absence: {options.changed} of {options.written} written at random meanwhile: "
        f"{copied} MiB copied ({copied * MIB / changed:.3f} of it) in {seconds:.1f} s"
    )


def lost(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    pauses: list[float] = []
    for _ in range(5):
        latency = ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--size=64M", "--time_based"]
        results: list[dict[str, Any]] = []
        worker = threading.Thread(
            target=lambda: results.append(fio(volume.uri, *latency, "--runtime=3"))  # noqa: B023
        )
        worker.start()
        time.sleep(1.5)
        volume.kill("r0")
        worker.join()
        pauses.append(results[0]["write"]["clat_ns"]["max"] / 1e6)
        volume.start_replica(0)
        volume.until_in_sync()
    shown = ", ".join(f"{pause:.0f}" for pause in pauses)
    print(f"lost: longest pause of a writer when a replica daemon is killed, ms: {shown}")


def rebuild(volume: Volume, options: argparse.Namespace) -> None:
    """See the module text."""
    size = parse_size(options.written)
    write(volume, 0, size)
    layer = volume.directory / "r1" / "layers" / "1.layer"
    usual = _foreground(volume, 10)
    volume.kill("r0")
    os.sync()
    target = volume.directory / "r0"
    rates = []
    for _ in range(2):
        begin = time.monotonic()
        subprocess.run(
            ["dd", f"if={layer}", f"of={target}/dd", "bs=4M", "conv=fsync,sparse"],
            check=True, capture_output=True,
        )  # fmt: skip
        rates.append(size / MIB / (time.monotonic() - begin))
        (target / "dd").unlink()
    for loaded in (False, True):
        shutil.rmtree(target)
        volume.log.write_text("")
        lost = next(m for m in volume.ask("status")["members"] if m["state"] != "IN_SYNC")
        volume.start_replica(0, lost["replica_uuid"])
        volume.until(lambda: "SYNCING" in volume.states(), "the rebuild has begun")
        begin = time.monotonic()
        during = _foreground(volume, 10) if loaded else None
        volume.until_in_sync()
        rate = size / MIB / (time.monotonic() - begin)
        ratio = f"{rate:.0f} MiB/s, {rate / max(rates):.2f} of dd ({max(rates):.0f} MiB/s)"
        if during is None:
            print(f"rebuild: {options.written}: {ratio}")
        else:
            print(
                f"rebuild under load: {ratio}; foreground p99 {during:.2f} ms, "
                f"{during / usual:.2f} times the usual {usual:.2f} ms"
            )
        volume.kill("r0")


def _foreground(volume: Volume, seconds: int) -> float:
    """The 99th percentile of a modest user's latencies, in ms."""
    job = fio(
        volume.uri, "--rw=randrw", "--bs=4k", "--iodepth=4", "--rate_iops=1000", "--size=256M",
        "--time_based", f"--runtime={seconds}",
    )  # fmt: skip
    worst = [job[way]["clat_ns"]["percentile"]["99.000000"] for way in ("read", "write")]
    return max(worst) / 1e6


def run(
    scenario: Callable[[Volume, argparse.Namespace], None],
    replicas: int,
    size: str,
    options: argparse.Namespace,
) -> None:
    """One scenario with a volume below `options.directory`; nothing is left of it."""
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="perf") as directory:
        volume = Volume(Path(directory), replicas, size)
        try:
            volume.start()
            volume.until_ready()
            scenario(volume, options)
            volume.end()
        finally:
            for name in list(volume.processes):
                volume.kill(name)


SCENARIOS = {  # what to do, and with how many replicas of which size by default
    "crash": (crash, 2, "1T", "20G"),
    "absence": (absence, 3, "8G", "2G"),
    "lost": (lost, 3, "1G", "64M"),
    "rebuild": (rebuild, 2, "16G", "4G"),
}


def main() -> None:
    """Run one scenario."""
    parse = argparse.ArgumentParser(prog="python -m perf.recovery", description=__doc__)
    parse.add_argument("scenario", choices=SCENARIOS)
    parse.add_argument("--directory", default=tempfile.gettempdir())
    parse.add_argument("--written", help="how much data the volume has")
    parse.add_argument("--changed", default="1G", help="absence: how much is written meanwhile")
    parse.add_argument("--snapshots", type=int, default=100, help="crash: how many")
    parse.add_argument("--cold", action="store_true", help="crash: with an empty page cache (root)")
    options = parse.parse_args()
    scenario, replicas, size, written = SCENARIOS[options.scenario]
    options.written = options.written or written
    run(scenario, replicas, size, options)


if __name__ == "__main__":
    main()
