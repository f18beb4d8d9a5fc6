"""Which blocks were explicitly zeroed in a head that has a parent: one byte per block, sparse.

Why it exists. A power cut can leave a map entry of the head durable whose data is not. If the data
reads as zeros, two stories fit: the block was new to the head (its old content is the parent's), or
it had been zeroed in the head before (its old content is zeros). The mark decides: it is durable
before the block's space is given back, and at the latest with the next flush, so a block without a
mark has never been zeroed here and falls back to its parent. See recovery.py for the whole rule.
Recovery ends with every ZEROS entry marked and no ABSENT one, whatever part of both was lost.

The file `layers/<id>.zeroed` is made by the first such zeroing and removed once the layer is sealed
and durable.
"""

from __future__ import annotations

import mmap
import os

from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE
from snapshots.index import index_bytes
from snapshots.syscalls import allocate, map_shared, storage_error, sync_directory

_MARKS = b"\1" * BLOCKS_PER_ZONE


def zeroed_path(layer_file: str) -> str:
    """The marks that belong to a layer file."""
    return layer_file.removesuffix(".layer") + ".zeroed"


class ZeroedMarks:
    """The marks of the head, opened on first use."""

    def __init__(self, layer_file: str, block_count: int) -> None:
        self.path = zeroed_path(layer_file)
        self.fd = -1
        self._bytes = index_bytes(block_count)
        self._memory: mmap.mmap | None = None
        self.changes = 0  # counts calls of `mark` that a flush has to make durable
        self.synced_changes = 0
        if os.path.exists(self.path):
            self._open()

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def _open(self) -> None:
        try:
            if self.fd < 0:
                self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self.fd, self._bytes)
            self._memory = map_shared(self.fd, self._bytes)
        except OSError as error:
            raise storage_error("opening", self.path, error) from error

    def make_writable(self, zone: int) -> None:
        """Allocate the page of a zone."""
        try:
            if self._memory is None:
                self._open()
                sync_directory(os.path.dirname(self.path))
            allocate(self.fd, zone * BLOCK_BYTES, BLOCK_BYTES)
        except OSError as error:
            raise storage_error("allocating a page of", self.path, error) from error

    def mark(self, block: int, count: int, *, durable: bool) -> None:
        """Mark blocks of one zone, whose page is allocated; durable before returning if asked."""
        assert self._memory is not None
        durable_already = self.changes == self.synced_changes
        if durable_already and self._memory[block : block + count] == _MARKS[:count]:
            return
        self._memory[block : block + count] = _MARKS[:count]
        if not durable:
            self.changes += 1
            return
        start = block // BLOCKS_PER_ZONE * BLOCK_BYTES
        page = self._memory[start : start + BLOCK_BYTES]
        try:
            os.pwritev(self.fd, [page], start, os.RWF_DSYNC)
        except OSError as error:
            raise storage_error("writing", self.path, error) from error

    def unmark(self, block: int, count: int) -> None:
        """Recovery: blocks of one zone that turned out not to be zeroed; durable with `sync`."""
        if self._memory is not None and b"\1" in os.pread(self.fd, count, block):
            self._memory[block : block + count] = bytes(count)

    def sync(self) -> None:
        """Make all marks durable."""
        if self.fd >= 0:
            os.fdatasync(self.fd)
        self.synced_changes = self.changes

    def marked(self, block: int) -> bool:
        """Whether a block carries a mark."""
        return self._memory is not None and os.pread(self.fd, 1, block) == b"\1"  # may be a hole
