"""Reading blocks: of the live volume and of snapshots, from the event loop and from threads.

Called with bounds already checked; block units throughout. A 4 KiB read of the live volume is one
preadv: the index names the layer. Reads in the event loop never wait for the disk: what is not in
memory is read again in a thread. A thread races with the event loop, so what it read is believed
only if it is consistent in itself (checksums, `layout`).
"""

from __future__ import annotations

import os
import struct
import threading
from array import array
from collections.abc import Iterator, Sequence

from protocol.checksum import ABSENT, UNUSABLE, ZEROS, block_checksum, crc32c
from protocol.errors import BlockdError, NotFoundError, StateError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE, REGIONS_PER_ZONE
from snapshots import chain
from snapshots.layer import LayerFile, look_ahead
from snapshots.masks import resolve, run_length
from snapshots.reserve import FULL_DISK
from snapshots.store import Store
from snapshots.syscalls import storage_error

WOULD_BLOCK = AGAIN = -1  # in place of a number of bytes: not in memory; not consistent
VIEWS_MAX = 4096  # resolved regions of snapshots kept: 1 KiB each, 16 GiB of snapshot

ENTRY_RUNS = {
    entry: memoryview(array("I", [entry]) * BLOCKS_PER_REGION) for entry in (ABSENT, ZEROS)
}
_pack_entry = struct.Struct("<I").pack_into
_IS_DATA = bytes([0]) + b"\1" * 255


def pieces(first_block: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut a range of blocks at region bounds."""
    while count > 0:
        length = min(count, BLOCKS_PER_REGION - (first_block & (BLOCKS_PER_REGION - 1)))
        yield first_block, length
        first_block += length
        count -= length


class ReadPath(Store):
    """See the module text."""

    def read_into(self, first_block: int, count: int, target: memoryview, layer_id: int = 0) -> int:
        """Read blocks of the live volume, or of the snapshot that is layer `layer_id`.

        `target` receives `count` u32 map entries (3 = zeros, else the checksum), then the data of
        the blocks that are not zeros, densely. Returns the bytes used. Waits for the disk; in a
        thread other than the event loop's the result can be AGAIN (-1): a write got in between,
        call again from the event loop.
        """
        self._check_readable()
        if threading.get_ident() != self._owner_thread:
            return self._read_in_thread(first_block, count, target, layer_id)
        start = 4 * count
        entries = target[:start].cast("I")
        return start + self._read_range(first_block, entries, target[start:], layer_id, 0)

    def read_ranges(
        self,
        firsts: Sequence[int],
        counts: Sequence[int],
        target: memoryview,
        layer_id: int = 0,
        headroom_bytes: int = 0,
    ) -> tuple[int, int]:
        """Read several ranges of blocks: the entries of all, then some room and the data of each.

        Stops before the first range that is not in memory or cannot be read (`read_into` says
        why). Returns how many were read, and the bytes used. The hot path of reading; event loop.
        """
        if not self.complete:
            return 0, 0
        index, index_ready, handles = self._index, self._index_ready, self.handles
        flags, live, preadv = self.nowait_flag, layer_id == 0, os.preadv
        start = at = 4 * sum(counts)  # where the data begins, and where more of it goes
        entries = target[:start].cast("I")
        done = blocks = 0
        for first, count in zip(firsts, counts, strict=True):
            region = first >> 10
            if count == 1 and live and index_ready[region >> 2]:
                slot = index[first]
                if slot == 0:
                    entries[blocks] = ZEROS
                    at += headroom_bytes
                    blocks += 1
                    done += 1
                    continue
                handle = handles[slot]
                if handle is not None and handle.ready[region]:
                    begin = at + headroom_bytes
                    data = target[begin : begin + 4096]
                    try:
                        got = preadv(handle.fd, (data,), (first + region + 2) << 12, flags)
                    except OSError:  # most often: it would block
                        break
                    if got == 4096:
                        entry = handle.map[first + (region << 20) + 1024]
                        entries[blocks] = entry if entry > ZEROS else UNUSABLE
                        at = begin + 4096
                        blocks += 1
                        done += 1
                        continue
            part = entries[blocks : blocks + count]
            begin = at + headroom_bytes
            try:
                got = self._read_range(first, part, target[begin:], layer_id, flags)
            except BlockdError:
                break
            if got == WOULD_BLOCK:
                break
            at = begin + got
            blocks += count
            done += 1
        if done < len(counts):
            target[4 * blocks : 4 * blocks + at - start] = target[start:at]
        return done, 4 * blocks + at - start

    def read_blocks(self, firsts: Sequence[int], vectors: Sequence[tuple[memoryview]]) -> list[int]:
        """Read single blocks of the live volume, each into the first view of its vector.

        Stops before the first that is not in memory, cannot be read or has no data; the entries
        of those before. What `read_ranges` does, for its most frequent case.
        """
        entries: list[int] = []
        if not self.complete:
            return entries
        index, index_ready, handles = self._index, self._index_ready, self.handles
        flags, preadv, append = self.nowait_flag, os.preadv, entries.append
        for first, vector in zip(firsts, vectors, strict=False):
            region = first >> 10
            if not index_ready[region >> 2]:
                break
            handle = handles[index[first]]  # slot 0, no data, has none
            if handle is None or not handle.ready[region]:
                break
            try:
                if preadv(handle.fd, vector, (first + region + 2) << 12, flags) != BLOCK_BYTES:
                    break
            except OSError:  # most often: it would block
                break
            append(handle.map[first + (region << 20) + 1024])
        return entries

    def _check_readable(self) -> None:
        if not self.complete:
            raise StateError(f"replica {self.path} is incomplete; read from another member")

    def _read_range(
        self, first_block: int, entries: memoryview, target: memoryview, layer_id: int, flags: int
    ) -> int:
        """Any read, as many blocks as `entries` has; the bytes of data, or WOULD_BLOCK.

        Entries are copied before the data they describe.
        """
        used = done = 0
        for block, length in pieces(first_block, len(entries)):
            slots = self._slots_of(block, length, layer_id, flags)
            if slots is None:
                return WOULD_BLOCK
            region, at = block >> 10, 0
            while at < length:
                slot, run = slots[at], run_length(slots, at)
                if slot == 0:
                    entries[done : done + run] = ENTRY_RUNS[ZEROS][:run]
                else:
                    handle = self._handle(slot)
                    if not handle.ready[region] and not handle.warm(region, flags):
                        return WOULD_BLOCK
                    number = block + at + (region << 20) + 1024
                    named = handle.map[number : number + run]
                    if min(named) <= ZEROS:  # the map is damaged: the index knows of data here
                        usable = [entry if entry > ZEROS else UNUSABLE for entry in named]
                        named = memoryview(array("I", usable))
                    entries[done : done + run] = named
                    data = target[used : used + run * BLOCK_BYTES]
                    if not _read_data(handle, block + at, data, flags):
                        return WOULD_BLOCK
                    used += run * BLOCK_BYTES
                at += run
                done += run
        return used

    def _read_in_thread(
        self, first_block: int, count: int, target: memoryview, layer_id: int
    ) -> int:
        """A read racing with the event loop: believed only if it is consistent in itself."""
        layout = self.layout
        if layout & 1:
            return AGAIN
        position = 4 * count
        entries = target[:position].cast("I")
        try:
            used = self._read_range(first_block, entries, target[position:], layer_id, 0)
        except StorageError:
            if self.layout != layout:  # a layer went away meanwhile
                return AGAIN
            raise
        for entry in entries:
            if entry == ZEROS:
                continue
            if block_checksum(target[position : position + BLOCK_BYTES]) != entry:
                return AGAIN
            position += BLOCK_BYTES
        agrees = self.layout == layout and position == 4 * count + used
        return position if agrees else AGAIN

    def _handle(self, slot: int) -> LayerFile:
        """The open file of a slot; a thread opens one for itself rather than change the tables."""
        handle = self.handles[slot]
        if handle is not None:
            return handle
        if threading.get_ident() == self._owner_thread:
            return self.open_slot(slot)
        return self.open_private(slot)

    def _slots_of(self, block: int, count: int, layer_id: int, flags: int) -> bytes | None:
        """The slots that hold blocks of one region; None: it would block."""
        if layer_id == 0 or layer_id == self.metadata.head_id:
            zone = block // BLOCKS_PER_ZONE
            if not self._index_ready[zone] and not self.warm_index(zone, flags):
                return None
            return self._index[block : block + count]
        region, start = block >> 10, block & (BLOCKS_PER_REGION - 1)
        view = self.views.get((layer_id, region))
        if view is None:
            view = self._resolve_view(layer_id, region, flags)
        return None if view is None else view[start : start + count]

    def _resolve_view(self, layer_id: int, region: int, flags: int) -> bytes | None:
        """The slots of a region as a snapshot sees it; None: it would block."""
        all_layers = self.metadata.layers
        if chain.find(all_layers, layer_id).removed:
            raise NotFoundError(f"layer {layer_id} is deleted; list the snapshots and pick one")
        maps = []
        for info in chain.chain(all_layers, layer_id):
            handle = self._handle(info.slot)
            if not handle.ready[region] and not handle.warm(region, flags):
                return None
            maps.append((info.slot, handle.map_block(region)))
        view = resolve(maps)
        if threading.get_ident() == self._owner_thread:  # a thread's view may be outdated already
            if len(self.views) >= VIEWS_MAX:
                self.views.clear()
            self.views[layer_id, region] = view
        return view

    def extents(
        self, first_block: int, count: int, layer_id: int = 0, limit: int = 1 << 16
    ) -> list[tuple[int, bool]]:
        """(block count, is data) runs from `first_block` on, neighbours merged, at most `limit`."""
        self._check_readable()
        found: list[tuple[int, bool]] = []
        for block, length in pieces(first_block, count):
            slots = self._slots_of(block, length, layer_id, 0)
            assert slots is not None
            kinds, at = slots.translate(_IS_DATA), 0
            while at < length:
                run, is_data = run_length(kinds, at), kinds[at] == 1
                if found and found[-1][1] == is_data:
                    found[-1] = (found[-1][0] + run, is_data)
                elif len(found) == limit:
                    return found
                else:
                    found.append((run, is_data))
                at += run
        return found

    def differences(
        self, first_block: int, count: int, base_id: int, layer_id: int = 0, limit: int = 1 << 16
    ) -> list[tuple[int, bool]]:
        """(block count, may differ) runs: the volume, or a snapshot, next to another snapshot.

        Only layers that one of them sees and the other does not are looked at, so the cost is that
        of what changed. Blocks written with the same content again count as changed.
        """
        self._check_readable()
        here, there = self._seen_by(layer_id), self._seen_by(base_id)
        layers = [self._handle(slot) for slot in sorted(here ^ there)]
        nexts = [-1] * len(layers)
        found: list[tuple[int, bool]] = []

        def add(length: int, differs: bool) -> None:
            if found and found[-1][1] == differs:
                found[-1] = (found[-1][0] + length, differs)
            else:
                found.append((length, differs))

        for block, length in pieces(first_block, count):
            region = block >> 10
            look_ahead(layers, nexts, region)
            if region not in nexts:
                add(length, False)
                continue
            if len(found) >= limit:
                break
            ours = self._slots_of(block, length, layer_id, 0)
            theirs = self._slots_of(block, length, base_id, 0)
            assert ours is not None
            assert theirs is not None
            kinds = _differing(ours, theirs)
            at = 0
            while at < length:
                run = run_length(kinds, at)
                add(run, kinds[at] == 1)
                at += run
        return found

    def _seen_by(self, layer_id: int) -> set[int]:
        """The slots of the layers in which a snapshot or the live volume is looked up."""
        layer_id = layer_id or self.metadata.head_id
        if chain.find(self.metadata.layers, layer_id).removed:
            raise NotFoundError(f"layer {layer_id} is deleted; list the snapshots and pick one")
        return {info.slot for info in chain.chain(self.metadata.layers, layer_id)}

    # The index

    def warm_index(self, zone: int, flags: int = 0) -> bool:
        """Bring a zone's index page into memory; False: it would block.

        The page of a clean zone is checked when it is read for the first time, and made anew from
        the maps if it is damaged.
        """
        index = self.index
        if index.touching_allocates:
            self._take_page(zone)
        if not index.warm(zone, flags):
            return False
        expected = self.dirty.page_checksum(zone)
        if expected and crc32c(index.page(zone)) != expected:
            if threading.get_ident() != self._owner_thread:
                index.ready[zone] = 0  # the event loop mends it
                return False
            self.index_errors += 1
            index.make_writable(zone)
            first = zone * REGIONS_PER_ZONE
            for region in range(first, min(first + REGIONS_PER_ZONE, self.head.region_count)):
                self.rebuild_index(region)
        return True

    def _take_page(self, zone: int) -> None:
        """Where looking at a hole takes space: take it here, where its lack is an error."""
        try:
            self.index.make_writable(zone)
        except StorageError as error:
            if error.errno not in FULL_DISK:
                raise
            self.file.reserve.release()  # reading must go on on a full disk
            self.index.make_writable(zone)

    def resolve_live(self, region: int) -> bytes:
        """What the index of a region must hold, from the maps of the live chain."""
        layers = chain.chain(self.metadata.layers, self.metadata.head_id)
        return resolve((info.slot, self._handle(info.slot).map_block(region)) for info in layers)

    def rebuild_index(self, region: int) -> None:
        """Store what `resolve_live` says; the zone's page is allocated."""
        self.store_index(region, self.resolve_live(region))

    def store_index(self, region: int, slots: bytes) -> None:
        """Store which slots hold the blocks of a region; the zone's page is allocated."""
        start = region * BLOCKS_PER_REGION
        assert self._index_ready[region // REGIONS_PER_ZONE]
        self._index[start : start + BLOCKS_PER_REGION] = slots


def _differing(ours: bytes, theirs: bytes) -> bytes:
    """1 for each byte in which they differ."""
    differ = int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little")
    return differ.to_bytes(len(ours), "little").translate(_IS_DATA)


def _read_data(handle: LayerFile, block: int, data: memoryview, flags: int) -> bool:
    """Read blocks of one region; False: it would block."""
    offset = (block + (block >> 10) + 2) << 12
    try:
        got = os.preadv(handle.fd, [data], offset, flags)
    except BlockingIOError:
        return False
    except OSError as error:
        raise storage_error("reading layer", handle.path, error) from error
    if got == len(data):
        return True
    if flags:
        return False
    handle.read(block, len(data) // BLOCK_BYTES, data)
    return True
