"""What a failed sync means for the next process: the page cache shows what the disk does not have.

After a failed fsync Linux calls the pages clean: they read as they were written, are not written
again, and the next fsync succeeds (see "fsyncgate", LWN 752063). A process that finds such a
replica after another one died would believe it. So a failed sync leaves the file `distrusted`, with
the boot in which it happened; the next process of that boot writes everything in the dirty zones
again, so that a later sync means something. Zones do not become clean by a sync that failed, so
nothing else can be affected. After a reboot only what the disk has is there, and the file means
nothing.

The file is not synced: it is for the same boot. It is removed once everything was written and
synced.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES, REGIONS_PER_ZONE
from snapshots import metadata
from snapshots.layer import map_offset
from snapshots.masks import masks, runs
from snapshots.syscalls import write_all

if TYPE_CHECKING:
    from snapshots.store import Store

FILE_NAME = "distrusted"


def mark(directory: str) -> None:
    """A sync failed in this boot."""
    with contextlib.suppress(OSError):  # then the disk does not even take this: it will be seen
        fd = os.open(os.path.join(directory, FILE_NAME), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            write_all(fd, (metadata.boot_id() or "unknown").encode(), 0)
        finally:
            os.close(fd)


def is_marked(directory: str) -> bool:
    """Has a sync failed in this boot and not been made up for?"""
    try:
        with open(os.path.join(directory, FILE_NAME), encoding="ascii") as file:
            return file.read() == (metadata.boot_id() or "unknown")
    except OSError:
        return False


def remove(directory: str) -> None:
    """It was made up for."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(directory, FILE_NAME))


def rewrite(store: Store) -> None:
    """Write everything in the dirty zones again and sync it; raises OSError."""
    zones = store.dirty.dirty_zones()
    buffer = memoryview(bytearray(REGION_BYTES))
    for info in store.metadata.layers:
        layer = store.layer_file(info.id)
        write_all(layer.fd, os.pread(layer.fd, BLOCK_BYTES, 0), 0)
        for zone in zones:
            first = zone * REGIONS_PER_ZONE
            for region in range(first, min(first + REGIONS_PER_ZONE, layer.region_count)):
                if not layer.is_allocated(region):
                    continue  # never written: a map block has its space before its first entry
                map_block = layer.map_block(region)
                write_all(layer.fd, map_block, map_offset(region))
                _, data = masks(map_block)
                for start, count in runs(data):
                    content = buffer[: count * BLOCK_BYTES]
                    layer.read(region * BLOCKS_PER_REGION + start, count, content)
                    layer.write(region * BLOCKS_PER_REGION + start, content)
        os.fdatasync(layer.fd)
    for zone in zones:
        at = zone * BLOCK_BYTES
        for fd in (store.index.fd, store.marks.fd):
            if fd >= 0:
                write_all(fd, os.pread(fd, BLOCK_BYTES, at), at)
    store.marks.sync()
    store.index.sync()
