"""Opening after a crash: make the dirty zones consistent again, look at nothing else.

A crash (kill -9 or power cut) can leave, in dirty zones only and only for writes no completed flush
covers: data without its map entry, an entry without its data, a block torn between two writes, a
wrong index byte, data under an entry that does not name it. Sealed layers are durable before
replica.json names them as sealed, so only the head is checked. For each head block whose entry is
a checksum the data does not have:

- data not all zeros: it is the old or new content (or a mix of a torn write); the entry is
  computed anew from the data;
- data all zeros: a head with a parent never stores zeros as data, so the data of this entry never
  reached the disk. What was there before? With a mark (zeroed.py) zeros: the entry becomes ZEROS.
  Without one the block was new to the head: ABSENT, the parent's content shows again. (A block
  written into a hole is there whole or not at all: ext4 and XFS make an extent readable after its
  data is on disk.)

Then all space under entries that are not checksums is given back, and the zone's index page is
rebuilt from the maps of the chain. The zones stay dirty until a later flush and index sync: they
may differ from other members (`Store.recovered_zones`).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right

from protocol.checksum import ABSENT, ZEROS, block_checksum
from protocol.errors import StorageError
from protocol.units import (
    BLOCK_BYTES,
    BLOCKS_PER_REGION,
    BLOCKS_PER_ZONE,
    REGION_BYTES,
    REGIONS_PER_ZONE,
)
from snapshots import chain
from snapshots.datapath import DataPath
from snapshots.masks import EVERY_BLOCK, Resolving, masks, runs

ZONES_AT_A_TIME = 1024  # 4096 regions, of which a few kilobytes each are kept
_ZERO_BLOCK = bytes(BLOCK_BYTES)


def recover(store: DataPath) -> None:
    """Repair every dirty zone, durably."""
    zones = store.dirty.dirty_zones()
    if not zones:
        return
    buffer = memoryview(bytearray(REGION_BYTES))
    for start in range(0, len(zones), ZONES_AT_A_TIME):
        regions: list[int] = []
        for zone in zones[start : start + ZONES_AT_A_TIME]:
            store.index.make_writable(zone)
            first = zone * REGIONS_PER_ZONE
            regions += range(first, min(first + REGIONS_PER_ZONE, store.head.region_count))
        for region in regions:
            _recover_head_region(store, region, buffer)
        _rebuild_index(store, regions)
    try:
        os.fdatasync(store.head.fd)
        store.marks.sync()
        store.index.sync()
    except OSError as error:
        raise StorageError(f"making the recovery of {store.path} durable: {error}") from error


def _rebuild_index(store: DataPath, regions: list[int]) -> None:
    """What `resolve_live` says of each region, layer by layer: few are open at a time, and where a
    layer has nothing it is not looked at."""
    resolving = {region: Resolving() for region in regions}
    for info in chain.chain(store.metadata.layers, store.metadata.head_id):
        layer, at = store.layer_file(info.id), 0
        while at < len(regions):
            region = layer.next_allocated(regions[at])
            if region in resolving:
                resolving[region].add(info.slot, layer.map_block(region))
            at = bisect_right(regions, region, at)
    for region, found in resolving.items():
        store.store_index(region, found.slots())


def _recover_head_region(store: DataPath, region: int, buffer: memoryview) -> None:
    head = store.head
    first_block = region * BLOCKS_PER_REGION
    if not head.is_allocated(region):
        if store.layered:
            _settle_marks(store, first_block, 0, 0)
        return
    map_block = head.map_block(region)
    _, data = masks(map_block)
    entries = array("I", map_block)
    repaired = False
    for start, count in runs(data):
        content = buffer[: count * BLOCK_BYTES]
        head.read(first_block + start, count, content)
        for number in range(count):
            block = content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            checksum = block_checksum(block)
            if checksum == entries[start + number]:
                continue
            if bytes(block) == _ZERO_BLOCK:
                marked = store.marks.marked(first_block + start + number)
                checksum = ZEROS if marked else ABSENT
            entries[start + number] = checksum
            repaired = True
    if repaired:
        head.make_writable(region)
        head.store(first_block, memoryview(entries))
    present, data = masks(entries.tobytes())
    if store.layered:
        _settle_marks(store, first_block, present, data)
    for start, count in runs(EVERY_BLOCK & ~data):
        head.punch(first_block + start, count)


def _settle_marks(store: DataPath, first_block: int, present: int, data: int) -> None:
    """Mark every ZEROS entry of a region and no ABSENT one, as entries that count from now on."""
    if present & ~data:
        store.marks.make_writable(first_block // BLOCKS_PER_ZONE)
    for start, count in runs(present & ~data):
        store.marks.mark(first_block + start, count, durable=False)
    for start, count in runs(EVERY_BLOCK & ~present):
        store.marks.unmark(first_block + start, count)
