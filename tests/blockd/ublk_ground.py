"""What the tests of ublk devices share: a node with a volume, and programs that use a device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from blockd.node import control
from blockd.node.objects import Volume
from protocol.errors import PeerError
from tests.blockd.node_harness import MIB, NodeHarness, until

PROGRAM_SECONDS = 200.0  # emulated machines are twenty times slower than this one

# Writes a counter to one block with O_DIRECT, reads it back, and notes the longest round. Ends when
# its standard input does; what it prints then: rounds, longest round in seconds. The rounds so far
# are in a file.
_PROBE = """
import mmap, os, select, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
at, page, back = int(sys.argv[2]), mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
rounds, longest = 0, 0.0
count = os.open(sys.argv[3], os.O_RDWR | os.O_CREAT)
print("begun", flush=True)
while not select.select([0], [], [], 0)[0]:
    began = time.monotonic()
    page[:8] = rounds.to_bytes(8, "little")
    assert os.pwrite(fd, page, at) == 4096
    if rounds % 8 == 0:
        os.fdatasync(fd)
    assert os.preadv(fd, [back], at) == 4096
    assert back[:] == page[:], (rounds, int.from_bytes(back[:8], "little"))
    longest = max(longest, time.monotonic() - began)
    rounds += 1
    os.pwrite(count, b"%d" % rounds, 0)
print(rounds, longest)
"""


def run(*command: str, check: bool = True) -> str:
    """Run a program to its end; its output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False
    )
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class Probe:
    """A program that uses a device without a pause, and how long it had to wait at most."""

    def __init__(self, device: str, offset: int = 0) -> None:
        self._count = tempfile.NamedTemporaryFile()  # noqa: SIM115 - it lives as long as we do
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROBE, device, str(offset), self._count.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"

    def rounds(self) -> int:
        """How many there were so far."""
        return int(Path(self._count.name).read_text() or 0)

    def wait_for_progress(self) -> None:
        """Wait until a round that begins from now on has ended."""
        before = self.rounds()
        until(lambda: self.rounds() > before + 1, "the device answers")

    def end(self) -> tuple[int, float]:
        """Rounds and the longest of them, in seconds; any error of the device fails the test."""
        said, errors = self._process.communicate("", timeout=PROGRAM_SECONDS)
        assert self._process.returncode == 0, errors
        rounds, longest = said.split()
        return int(rounds), float(longest)


def daemon_pid(node: NodeHarness, name: str = "demo") -> int | None:
    """The volume daemon, as the node service knows it."""
    return node.service.context.store.get(Volume, name).status.pid


def wait_for_a_spare(node: NodeHarness) -> None:
    """Until a process is there that has everything loaded and reads its orders."""

    def reads() -> bool:
        spare = node.service.context.supervisor._spare
        return spare is not None and Path(f"/proc/{spare.pid}/syscall").read_text()[:6] == "0 0x0 "

    until(reads, "a spare waits to become the next volume daemon")


def wait_for_another_daemon(
    node: NodeHarness, old: int, name: str = "demo", state: str = "live"
) -> int:
    """The pid of the volume daemon that follows `old`, once its devices are in that state.

    With an empty state: once it answers at all.
    """
    path = node.service.context.volume_daemon(
        node.service.context.store.get(Volume, name), []
    ).control

    found: list[int] = []

    def serves() -> bool:
        try:
            answer = control.status(path)
        except PeerError:
            return False
        found.append(int(answer["pid"]))
        devices = answer["devices"]
        live = bool(devices) and all(device["state"] == state for device in devices)
        return found[-1] != old and (live or not state)

    until(serves, "another volume daemon serves the device")
    return found[-1]


def allocated_bytes(directory: Path) -> int:
    """What the files below take on their disk."""
    return sum(512 * os.lstat(path).st_blocks for path in directory.rglob("*"))


__all__ = ["MIB", "NodeHarness", "until"]
