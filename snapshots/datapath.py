"""Writing and zeroing blocks: the part of a replica every change goes through.

Called from the event loop with bounds and checksums already checked; block units throughout. A
4 KiB write is one pwrite, a store into the map and a store into the index. Everything else
(`_prepare`) happens once per region and zone.

Order of a write, and why:
1. zone dirty and durable, index page and map block allocated: from here only data can lack space;
2. data of blocks new to the head: nothing visible refers to it, so a full disk changes nothing;
3. data of blocks the head has already: in place, needs no space;
4. map entries, then index bytes.
A process killed in between leaves each block old or new; see recovery.py.

`index[b]` is the head's slot exactly if the head's entry of b is a checksum. A head that has a
parent never stores a block of zeros as data but as a ZEROS entry; recovery relies on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from collections.abc import Collection, Iterator, Sequence

from protocol.checksum import ABSENT, ZEROS, block_checksum
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE
from snapshots.dirty import CLEAN, HOT
from snapshots.layer import WRITABLE, block_offset, entry_number
from snapshots.masks import SLOT_RUNS
from snapshots.readpath import ENTRY_RUNS, ReadPath, pieces
from snapshots.reserve import FULL_DISK
from snapshots.syscalls import allocate, storage_error, write_all

Runs = list[tuple[int, int]]  # (first block, count)

ZERO_BLOCK = bytes(BLOCK_BYTES)
ZERO_CHECKSUM = block_checksum(ZERO_BLOCK)


class DataPath(ReadPath):
    """See the module text."""

    # Writing

    def mark_dirty(self, numbers: Collection[int]) -> None:
        """Make zones ready to be written: their index pages allocated, their dirty bits durable."""
        self.check_open()
        zones = self._zones
        for zone in numbers:
            if not self._index_ready[zone]:
                self.warm_index(zone)
            if zones[zone] == CLEAN:
                self.index.make_writable(zone)
        self.dirty.mark(numbers)

    def _prepare(self, first_block: int, count: int) -> None:
        """Everything a write to these blocks needs besides the data's own space."""
        self.check_open()
        last_block = first_block + count - 1
        first_zone, last_zone = first_block // BLOCKS_PER_ZONE, last_block // BLOCKS_PER_ZONE
        states = self._zones[first_zone : last_zone + 1]
        if states.count(HOT) != len(states):
            self.mark_dirty(range(first_zone, last_zone + 1))
        for region in range(first_block >> 10, (last_block >> 10) + 1):
            if self._head_ready[region] != WRITABLE:
                self.head.make_writable(region)

    def write(
        self, first_block: int, count: int, data: memoryview, checksums: Sequence[int]
    ) -> None:
        """Write whole blocks. All or nothing when the disk is full (StorageError, ENOSPC)."""
        region = first_block >> 10
        if (
            self._head_ready[region] != WRITABLE
            or self._zones[region >> 2] != HOT
            or (first_block + count - 1) >> 10 != region
            or (self.layered and ZERO_CHECKSUM in checksums)
        ):
            self._write_slowly(first_block, count, data, checksums)
            return
        slot = self._head_slot
        entry = first_block + (region << 20) + 1024  # layer.entry_number
        offset = (first_block + region + 2) << 12  # layer.block_offset
        try:
            if count == 1:
                if os.pwrite(self._head_fd, data, offset) != BLOCK_BYTES:
                    write_all(self._head_fd, data, offset)
                self._head_map[entry] = checksums[0]
                self._index[first_block] = slot
                return
            held = self._index[first_block : first_block + count].count(slot)
            if 0 < held < count:
                self._write_runs([(first_block, count)], first_block, data, checksums)
                return
            write_all(self._head_fd, data, offset)
        except OSError as error:
            self._take_back([(first_block, count)])
            raise storage_error("writing layer", self.head.path, error) from error
        self._head_map[entry : entry + count] = (
            checksums if isinstance(checksums, memoryview) else array("I", checksums)
        )
        self._index[first_block : first_block + count] = SLOT_RUNS[slot][:count]

    def _write_slowly(
        self, first_block: int, count: int, data: memoryview, checksums: Sequence[int]
    ) -> None:
        """A write that needs preparation, crosses regions, or holds blocks of zeros."""
        self._prepare(first_block, count)
        data_runs: Runs = [(first_block, count)]
        zero_runs: Runs = []
        if self.layered and ZERO_CHECKSUM in checksums:
            data_runs, zero_runs = _split_zeros(first_block, data, checksums)
            for block, length in zero_runs:
                self._prepare_zero(block, length, keep_allocated=False)
        self._write_runs(data_runs, first_block, data, checksums)
        for block, length in zero_runs:
            self._apply_zero(block, length, keep_allocated=False)

    def _write_runs(
        self,
        runs: Runs,
        base: int,
        data: memoryview,
        checksums: Sequence[int],
    ) -> None:
        """Write prepared runs: blocks new to the head first. `data` starts at block `base`."""
        slot = self._head_slot
        fresh: Runs = []
        held: Runs = []
        for first, count in runs:
            for block, length in pieces(first, count):
                live = self._index[block : block + length]
                at = 0
                while at < length:
                    in_head = live[at] == slot
                    end = at + 1
                    while end < length and (live[end] == slot) == in_head:
                        end += 1
                    (held if in_head else fresh).append((block + at, end - at))
                    at = end
        try:
            for block, length in fresh + held:
                start = (block - base) * BLOCK_BYTES
                self.head.write(block, data[start : start + length * BLOCK_BYTES])
        except StorageError:
            self._take_back(fresh)
            raise
        values = (
            checksums if isinstance(checksums, memoryview) else memoryview(array("I", checksums))
        )
        for block, length in fresh + held:
            self.head.store(block, values[block - base : block - base + length])
            self._index[block : block + length] = SLOT_RUNS[slot][:length]

    def _take_back(self, runs: Runs) -> None:
        """Remove what a failed write left under entries that do not name it.

        Recovery must not find it there later. Copies made by folding may go with it; folding
        notices that.
        """
        with contextlib.suppress(
            StorageError
        ):  # the disk refuses this too: the write's error counts
            for first, count in runs:
                for block, length in pieces(first, count):
                    for number in range(block, block + length):
                        if self._index[number] == self._head_slot:
                            continue
                        if self._head_map[entry_number(number)] == ABSENT:
                            self.head.punch(number, 1)
                        else:
                            self._clear_unnamed(number, 1)

    # Zeroing

    def zero(self, first_block: int, count: int, *, keep_allocated: bool = False) -> None:
        """Make blocks read as zeros whatever lies in older layers.

        Space is given back, or with `keep_allocated` reserved so that a later write cannot lack it.
        All or nothing when the disk is full.
        """
        self.check_open()
        ranges = list(self._zero_pieces(first_block, count, keep_allocated))
        try:
            self._prepare_pieces(ranges, keep_allocated)
        except StorageError as error:
            if keep_allocated or error.errno not in FULL_DISK:
                raise
            self.file.reserve.release()  # trimming is how a full disk is emptied
            self._prepare_pieces(ranges, keep_allocated)
        for block, length in ranges:
            self._apply_zero(block, length, keep_allocated)

    def _prepare_pieces(self, ranges: Runs, keep_allocated: bool) -> None:
        for block, length in ranges:
            self._prepare(block, length)
            self._prepare_zero(block, length, keep_allocated)

    def _zero_pieces(
        self, first_block: int, count: int, keep_allocated: bool
    ) -> Iterator[tuple[int, int]]:
        """The pieces of a range where zeroing changes anything; skips unused index pages."""
        end = first_block + count
        must_record = keep_allocated or not self.complete
        while first_block < end:
            if not must_record:
                first_block = self.index.next_used(first_block)
                if first_block >= end:
                    return
            length = min(end - first_block, BLOCKS_PER_REGION - (first_block & 1023))
            if must_record or self._zeroing_changes(first_block, length):
                yield first_block, length
            first_block += length

    def _zeroing_changes(self, block: int, length: int) -> bool:
        live = self._index[block : block + length]
        if live.count(0) != length:
            return True
        # All zeros already; but a ZEROS entry may have space reserved, which is to be given back.
        region = block >> 10
        start = (block & (BLOCKS_PER_REGION - 1)) * 4
        return self.head.map_block(region)[start : start + length * 4].count(0) != length * 4

    def _prepare_zero(self, block: int, length: int, keep_allocated: bool) -> None:
        """Allocate what zeroing a piece of one region needs besides `_prepare`."""
        if self.layered:
            for first, _ in pieces(block, length):
                self.marks.make_writable(first // BLOCKS_PER_ZONE)
        if keep_allocated:
            try:
                for first, count in pieces(block, length):
                    offset = (first + (first >> 10) + 2) << 12
                    allocate(self._head_fd, offset, count * BLOCK_BYTES)
            except OSError as error:
                raise storage_error("reserving space in", self.head.path, error) from error

    def _apply_zero(self, first_block: int, total: int, keep_allocated: bool) -> None:
        """Zero prepared blocks: mark, map entries, index, and only then the space."""
        explicit = self.layered or keep_allocated
        entries = ENTRY_RUNS[ZEROS if explicit else ABSENT]
        for block, count in pieces(first_block, total):
            in_head = self._head_slot in self._index[block : block + count]
            if self.layered:
                self.marks.mark(block, count, durable=in_head)
            self.head.store(block, entries[:count])
            self._index[block : block + count] = SLOT_RUNS[0][:count]
            if not keep_allocated:
                self.head.punch(block, count)
            else:
                self._clear_unnamed(block, count)

    def _clear_unnamed(self, first_block: int, total: int) -> None:
        """Overwrite all data under ZEROS entries and keep the space.

        Recovery must never take it for a block's: it can be the block's own of before, a copy that
        folding made, or what a refused write left. Reserved space without data costs nothing.
        """
        block, end = first_block, first_block + total
        while block < end:
            start = block_offset(block)
            try:
                data = os.lseek(self._head_fd, start, os.SEEK_DATA)
                hole = os.lseek(self._head_fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                raise storage_error("clearing blocks of", self.head.path, error) from error
            block += (data - start) // BLOCK_BYTES
            stop = min(end, block + -(-(hole - block_offset(block)) // BLOCK_BYTES))
            if block < stop:
                self.head.write(block, memoryview(bytes((stop - block) * BLOCK_BYTES)))
            block = stop if stop > block else end


def _split_zeros(first_block: int, data: memoryview, checksums: Sequence[int]) -> tuple[Runs, Runs]:
    """(runs with data, runs of zeros) of a write."""
    runs: dict[bool, Runs] = {False: [], True: []}
    last = None
    for number, checksum in enumerate(checksums):
        start = number * BLOCK_BYTES
        zeros = checksum == ZERO_CHECKSUM and data[start : start + BLOCK_BYTES] == ZERO_BLOCK
        if zeros is last:
            block, length = runs[zeros][-1]
            runs[zeros][-1] = (block, length + 1)
        else:
            runs[zeros].append((first_block + number, 1))
        last = zeros
    return runs[False], runs[True]
