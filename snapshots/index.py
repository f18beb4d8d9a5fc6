"""The index: for each block of the volume the slot of the layer that holds it, 0 = zeros.

One sparse file, one byte per block, memory-mapped and shared. Opening a volume reads none of it and
its memory is page cache. A 4 KiB page covers exactly one 16 MiB zone, so a zone of the dirty log
and a page of the index stand and fall together: a page is allocated before the zone's dirty bit is
set, and a zone's bit is cleared only after the page is durable.
"""

from __future__ import annotations

import contextlib
import os

from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE
from snapshots.syscalls import allocate, map_shared, storage_error, touching_allocates

_scratch = bytearray(BLOCK_BYTES)


def index_bytes(block_count: int) -> int:
    """Length of the index file: whole pages."""
    return -(-block_count // BLOCKS_PER_ZONE) * BLOCKS_PER_ZONE


class Index:
    """The open index. `memory` is stored to directly by the data path."""

    def __init__(self, path: str, block_count: int) -> None:
        self.path = path
        self.fd = -1
        self.fd = open_sized(path, index_bytes(block_count))
        try:
            self.memory = map_shared(self.fd, index_bytes(block_count))
        except OSError as error:
            raise storage_error("mapping", path, error) from error
        self.touching_allocates = touching_allocates(self.fd)
        self.ready = bytearray(index_bytes(block_count) // BLOCKS_PER_ZONE)  # 1: page was read once

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def warm(self, zone: int, flags: int = 0) -> bool:
        """Bring a zone's page into the page cache; False: it would block (RWF_NOWAIT)."""
        try:
            got = os.preadv(self.fd, [_scratch], zone * BLOCK_BYTES, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise storage_error("reading", self.path, error) from error
        if got != BLOCK_BYTES:
            return False
        self.ready[zone] = 1
        return True

    def page(self, zone: int) -> bytes:
        """A copy of a zone's page."""
        return self.memory[zone * BLOCK_BYTES : (zone + 1) * BLOCK_BYTES]

    def make_writable(self, zone: int) -> None:
        """Allocate a zone's page so that it can be stored to."""
        try:
            allocate(self.fd, zone * BLOCK_BYTES, BLOCK_BYTES)
        except OSError as error:
            raise storage_error("allocating a page of", self.path, error) from error
        self.warm(zone)

    def next_used(self, block: int) -> int:
        """The first block from `block` on that can have a non-zero byte; the end if there is none.

        Skips unallocated pages without touching them, but only those this process has not used:
        what lseek(2) says about stores that are still in the page cache need not be relied on.
        """
        zone = self.ready.find(1, block // BLOCKS_PER_ZONE)
        used = zone * BLOCKS_PER_ZONE if zone >= 0 else len(self.memory)
        if used > block:
            with contextlib.suppress(OSError):  # ENXIO: only a hole is left
                used = min(used, os.lseek(self.fd, block, os.SEEK_DATA))
        return max(block, used)

    def sync(self) -> None:
        """Make all stores durable."""
        os.fdatasync(self.fd)


def open_sized(path: str, length: int) -> int:
    """Open a file for reading and writing that must exist with this length.

    It may be longer: growing stopped half way.
    """
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError as error:
        raise StorageError(
            f"{path} is missing; rebuild this replica from another member"
        ) from error
    except OSError as error:
        raise storage_error("opening", path, error) from error
    actual = os.fstat(fd).st_size
    if actual < length:
        os.close(fd)
        raise StorageError(
            f"{path} is {actual} bytes long, expected {length}; rebuild this replica from another"
        )
    return fd
