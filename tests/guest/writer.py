"""Runs in the guest: programs that write to a mounted file system.

    python3 -m tests.guest.writer keep LOG DIRECTORY...
    python3 -m tests.guest.writer fill FILE MIB

`keep` writes until it is killed, in each directory at the same time: a file of random content and
length, fsync of it and of the directory, then its line for `sha256sum --check` in LOG. So whatever
stands in LOG has to survive. Each also overwrites parts of a file `unsynced`, without any fsync.

`fill` writes a file through the page cache, then fsync, and reads parts of it back from the device.
It prints a JSON object with what that took.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

MIB = 1 << 20
FILE_BYTES_MAX = 128 << 10
UNSYNCED_BYTES = 64 << 10
UNSYNCED_PARTS = 256  # 16 MiB
SAMPLE_SECONDS = 0.25
CHECKED_EVERY = 16  # MiB: reading all of it back would take as long as writing it


def keep(log: str, directories: list[str]) -> None:
    """Write in all directories until killed."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    threads = [threading.Thread(target=_keep, args=(Path(name), fd)) for name in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _keep(directory: Path, log: int) -> None:
    above = os.open(directory, os.O_RDONLY)
    unsynced = os.open(directory / "unsynced", os.O_WRONLY | os.O_CREAT)
    for number in itertools.count():
        content = os.urandom(random.randint(1, FILE_BYTES_MAX))
        path = directory / f"file{number}"
        with path.open("wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
        os.fsync(above)
        os.write(log, f"{hashlib.sha256(content).hexdigest()}  {path}\n".encode())
        os.pwrite(unsynced, os.urandom(UNSYNCED_BYTES), number % UNSYNCED_PARTS * UNSYNCED_BYTES)


def fill(path: str, count_mib: int) -> None:
    """Write `count_mib` MiB, sync them, look at some of them, and print figures."""
    memory = _Memory()
    source = memoryview(os.urandom(2 * MIB))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    began = time.monotonic()
    for index in range(count_mib):
        assert os.write(fd, _part(source, index)) == MIB
    written = time.monotonic()
    os.fsync(fd)
    synced = time.monotonic()
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    checked = range(0, count_mib, CHECKED_EVERY)
    bad = [at for at in checked if os.pread(fd, MIB, at * MIB) != _part(source, at)]
    figures = {
        "bad_mib": bad,
        "write_seconds": round(written - began, 1),
        "sync_seconds": round(synced - written, 1),
        "mib_per_second": round(count_mib / (synced - began), 1),
        "check_seconds": round(time.monotonic() - synced, 1),
        "available_mib_min": memory.available_kib_min >> 10,
        "dirty_mib_max": memory.dirty_kib_max >> 10,
    }
    print(json.dumps(figures))


def _part(source: memoryview, index: int) -> memoryview:
    """MiB number `index` of the file: no two blocks near each other are the same."""
    start = index * 4099 % MIB
    return source[start : start + MIB]


class _Memory:
    """How little memory was available, and how much of it dirty, since this was made."""

    def __init__(self) -> None:
        self.available_kib_min = sys.maxsize
        self.dirty_kib_max = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/meminfo").read_text().splitlines()
            kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
            self.available_kib_min = min(self.available_kib_min, kib["MemAvailable"])
            self.dirty_kib_max = max(self.dirty_kib_max, kib["Dirty"] + kib["Writeback"])
            time.sleep(SAMPLE_SECONDS)


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(sys.argv[2], sys.argv[3:])
    else:
        fill(sys.argv[2], int(sys.argv[3]))
