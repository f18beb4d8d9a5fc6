"""The daemons under torture, started by hand: three replicas and the volume daemon.

Everything lies in one directory; everything started is ended by its pid, whatever happens. Two of
the replicas have small disks of their own where this user may mount: an ext4 file system and a
tmpfs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from protocol.units import BLOCKS_PER_REGION, BLOCKS_PER_ZONE
from tests.blockd.daemon_harness import Daemon
from tests.blockd.test_daemons_full_disk import small_disk
from tests.torture.ledger import BLOCK_BYTES, Wrong
from tests.torture.traffic import Area

MIB = 1 << 20
REPLICAS = 3
SIZE_BYTES = 64 * MIB
BLOCK_COUNT = SIZE_BYTES // BLOCK_BYTES
DISK_MIB = 48  # of the small disks: the areas, six snapshots of them, maps and tables
ANSWER_SECONDS = 0.6  # after which a replica that does not answer is OUT
START_SECONDS_MAX = 40.0
HEALTHY_SECONDS_MAX = 60.0
AREAS: Sequence[Area] = (
    (0, 96),
    (BLOCKS_PER_REGION - 64, 128),
    (BLOCKS_PER_ZONE - 64, 128),
    (BLOCK_COUNT - 64, 64),
)
BLOCKS = tuple(block for first, count in AREAS for block in range(first, first + count))

Answer = dict[str, Any]


def wait_for(what: str, probe: Callable[[], Any], seconds: float) -> Any:
    """The first true value of `probe`."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise Wrong(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
    return value


class Process(Daemon):
    """A daemon that is waited for after others have been started, and stopped in the middle."""

    def ready(self) -> None:
        """Wait for its ready line."""
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], START_SECONDS_MAX)[0]:
            raise Wrong(f"{self.arguments[0]} daemon does not get ready: see {self.log}")
        if not self.process.stdout.readline().startswith("ready"):
            lines = self.log.read_text().splitlines()[-20:]
            raise Wrong(f"{' '.join(self.arguments)} did not start:\n  " + "\n  ".join(lines))

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def destroy(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait(START_SECONDS_MAX)
            if self.process.stdout is not None:
                self.process.stdout.close()


class Ground:
    """Three replica daemons and a volume daemon on unix sockets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._all: list[Process] = []
        self._mounted: list[Path] = []
        self._generation = 0
        self.disks: dict[int, Path] = {}  # replica to its small disk
        if os.geteuid() == 0:
            for number, kind in enumerate(("ext4", "tmpfs")):
                self._make_disk(number, kind)
        self.replicas = [self._replica(number) for number in range(REPLICAS)]
        self.volume = self.next_volume()

    def _make_disk(self, number: int, kind: str) -> None:
        path = self.directory / f"disk{number}"
        if small_disk(path, kind, DISK_MIB):
            self._mounted.append(path)
            self.disks[number] = path
            (path / "replica").mkdir()
            (self.directory / f"replica{number}").symlink_to(path / "replica")

    def _replica(self, number: int) -> Process:
        path, listen = self.path(number), f"unix:{self.directory}/r{number}.sock"
        words = ["replica", str(path), "--listen", listen, "--create", "--size", str(SIZE_BYTES)]
        return self._known(Process(f"r{number}", words, self.directory))

    def next_volume(self) -> Process:
        """A volume daemon with sockets of its own."""
        self._generation += 1
        self._nbd = self.directory / f"nbd{self._generation % 2}.sock"
        words = ["volume", "vol", "--nbd", f"unix:{self._nbd}"]
        words += ["--state", str(self.directory / "state.db")]
        words += ["--answer-timeout", str(ANSWER_SECONDS)]
        for number in range(REPLICAS):
            words += ["--replica", f"unix:{self.directory}/r{number}.sock"]
        return self._known(Process(f"v{self._generation % 2}", words, self.directory))

    def _known(self, process: Process) -> Process:
        self._all.append(process)
        return process

    def path(self, number: int) -> Path:
        """The directory of a replica."""
        return self.directory / f"replica{number}"

    def nbd(self) -> Path:
        """The socket clients use now."""
        return self._nbd

    def start(self, processes: Iterable[Process]) -> None:
        """Start daemons together."""
        processes = list(processes)
        for process in processes:
            process.launch()
        for process in processes:
            process.ready()

    def start_everything(self) -> None:
        self.start([*self.replicas, self.volume])

    def stop_everything(self) -> None:
        """A clean end of all daemons."""
        for process in (self.volume, *self.replicas):
            code = process.end(signal.SIGTERM)
            if code:
                raise Wrong(f"{process.arguments[0]} daemon ended with code {code}: {process.log}")

    # ---- what the volume daemon says ----------------------------------------------------------

    def ask(self, command: str, **content: Any) -> Answer:
        """A control command; an answer that is no success if there is none."""
        try:
            return self.volume.ask(command, **content)
        except (OSError, ValueError) as error:
            return {"ok": False, "message": repr(error)}

    def status(self) -> Answer:
        return self.ask("status")

    def member(self, number: int) -> Answer:
        """What the volume daemon says of a replica; {} if it says nothing."""
        address = f"unix:{self.directory}/r{number}.sock"
        members = self.status().get("members", [])
        return next((dict(m) for m in members if m["address"] == address), {})

    def export(self, snapshot: str = "") -> str:
        return f"vol@{snapshot}" if snapshot else "vol"

    def make_snapshot(self, name: str) -> bool:
        """Ask for a snapshot; False: nobody knows whether it is there."""
        return bool(self.ask("snapshot-create", name=name)["ok"])

    def remove_snapshot(self, name: str) -> None:
        """Ask for the end of a snapshot; whether it is there afterwards nobody knows."""
        self.ask("snapshot-remove", name=name)

    def snapshots(self) -> list[str]:
        return [str(snapshot["name"]) for snapshot in self.volume.must("status")["snapshots"]]

    def is_healthy(self) -> bool:
        """All members in sync; those that are not are asked for."""
        status = self.status()
        if not status["ok"]:
            return False
        for member in status["members"]:
            if member["state"] == "OUT" and member["connected"] and not member["rebuild"]:
                self.ask("rebuild", replica_uuid=member["replica_uuid"])
        states = {member["state"] for member in status["members"]}
        busy = status["paused"] or status["held"]
        return states == {"IN_SYNC"} and status["health"] == "healthy" and not busy

    def until_healthy(self) -> None:
        try:
            wait_for("all members in sync", self.is_healthy, HEALTHY_SECONDS_MAX)
        except Wrong as error:
            raise Wrong(f"{error}; the volume daemon says: {self.status()}") from None

    # ---- the end ------------------------------------------------------------------------------

    def destroy(self) -> None:
        """End every process and unmount every disk."""
        for process in self._all:
            process.destroy()
        gc.collect()  # this process may have had files of a replica open
        for path in self._mounted:
            subprocess.run(["umount", str(path)], check=True, timeout=30)
        self._mounted.clear()
