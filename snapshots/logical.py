"""Logical layers: what members compare and copy, whatever each of them has folded already.

A logical layer is a layer together with the removed layers below it that will be folded into it
(chain.between). Members agree on logical layers block by block, but not on which file of the group
holds a block. Each block of it is absent (look further down), zeros, or data. Data that is all
zeros counts as zeros, and zeros above nothing but zeros count as absent: a member that is being
filled records a trim that others need not record.

Everything here reads; `layer_read` and `layer_digests` may run in a thread: if layers changed
meanwhile the result is thrown away (AGAIN).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator

from protocol.checksum import ABSENT, UNUSABLE, ZEROS, blake2b, block_checksum
from protocol.errors import RequestError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION
from snapshots import chain
from snapshots.datapath import ZERO_BLOCK, ZERO_CHECKSUM, DataPath
from snapshots.layer import LayerFile, next_region
from snapshots.masks import EMPTY_MAP, SLOT_RUNS, masks, resolve, run_length, runs
from snapshots.metadata import LayerInfo
from snapshots.readpath import AGAIN

DIGEST_BYTES = 16
ABSENT_DIGEST = bytes(DIGEST_BYTES)
ZEROS_DIGEST = b"\1" + bytes(DIGEST_BYTES - 1)
BAD_DIGEST = b"\xff" * DIGEST_BYTES  # the data does not match its checksum, or cannot be read
REGION_RUNS_MAX = 1 << 16  # of one answer: 1 MiB of JSON at most

_ZERO_ENTRY = ZERO_CHECKSUM.to_bytes(4, "little")

_Data = tuple[int, int, LayerFile]  # first block, block count, the file that holds them


class Logical(DataPath):
    """See the module text."""

    def layer_regions(
        self, layer_id: int, parent_id: int, first_region: int = 0
    ) -> list[tuple[int, int]]:
        """(first region, count) runs of regions with an entry, at most REGION_RUNS_MAX of them."""
        layers = [self._layer(info.id) for info in self._between(layer_id, parent_id)]
        found: list[tuple[int, int]] = []
        while True:
            region = next_region(layers, first_region)
            if region < 0:
                return found
            if found and sum(found[-1]) == region:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            elif len(found) == REGION_RUNS_MAX:
                return found
            else:
                found.append((region, 1))
            first_region = region + 1

    def layer_read(
        self, layer_id: int, parent_id: int, first: int, count: int, target: memoryview
    ) -> int:
        """Blocks of one region: their entries, then the data of those that have some, densely.

        Returns the bytes used. Checksums are left to who gets it.
        """
        layout = self.layout
        entries, data_runs = self._compose(layer_id, parent_id, first, count)
        used = 4 * count
        for block, length, layer in data_runs:
            end = used + length * BLOCK_BYTES
            layer.read(block, length, target[used:end])
            used = end
        if ZERO_CHECKSUM in entries:
            below = _Below(self, parent_id, first // BLOCKS_PER_REGION)
            used = self._drop_zeros(entries, below, first, target, used)
        target[: 4 * count] = entries.tobytes()
        return used if self._undisturbed(layout) else AGAIN

    def layer_digests(
        self, layer_id: int, parent_id: int, first: int, count: int, *, from_disk: bool = False
    ) -> bytes:
        """16 bytes per block of one region; b"" in place of AGAIN.

        ABSENT_DIGEST, ZEROS_DIGEST, BAD_DIGEST, or the BLAKE2b of the data. `from_disk`: what is in
        memory and on the disk is read from the disk.
        """
        layout = self.layout
        entries, data_runs = self._compose(layer_id, parent_id, first, count)
        below = _Below(self, parent_id, first // BLOCKS_PER_REGION)
        digests = [ZEROS_DIGEST if entry == ZEROS else ABSENT_DIGEST for entry in entries]
        for start, length, layer in data_runs:
            content = memoryview(bytearray(length * BLOCK_BYTES))
            if from_disk:
                layer.forget_cached(start, length)
            readable = True
            try:
                layer.read(start, length, content)
            except StorageError:
                readable = False
            for number in range(start - first, start - first + length):
                at = (number - start + first) * BLOCK_BYTES
                block = content[at : at + BLOCK_BYTES]
                if not readable or block_checksum(block) != entries[number]:
                    digests[number] = BAD_DIGEST
                elif entries[number] == ZERO_CHECKSUM and block == ZERO_BLOCK:
                    bare = below.is_bare(first + number)
                    digests[number] = ABSENT_DIGEST if bare else ZEROS_DIGEST
                else:
                    digests[number] = blake2b(block, digest_size=DIGEST_BYTES).digest()
        return b"".join(digests) if self._undisturbed(layout) else b""

    def layer_check(self, layer_id: int, parent_id: int, first_region: int, count: int) -> str:
        """A digest of what the maps of some regions say; event loop, so at a point of the order."""
        digest = blake2b(digest_size=DIGEST_BYTES)
        for region in range(first_region, min(first_region + count, self.head.region_count)):
            first = region * BLOCKS_PER_REGION
            entries, _ = self._compose(layer_id, parent_id, first, BLOCKS_PER_REGION)
            if ZERO_CHECKSUM in entries:
                entries = array("I", [ZEROS if e == ZERO_CHECKSUM else e for e in entries])
                _Below(self, parent_id, region).settle(entries, first)
            content = entries.tobytes()
            if content != EMPTY_MAP:
                digest.update(region.to_bytes(8, "little") + content)
        return digest.hexdigest()

    def _compose(
        self, layer_id: int, parent_id: int, first: int, count: int
    ) -> tuple[array[int], list[_Data]]:
        """The entries of blocks of one region, and where the data of those lies that have some."""
        region, start = first // BLOCKS_PER_REGION, first % BLOCKS_PER_REGION
        if count <= 0 or start + count > BLOCKS_PER_REGION or first < 0:
            raise RequestError(f"blocks {first} to {first + count} are not of one region")
        layers = [self._layer(info.id) for info in self._between(layer_id, parent_id)]
        if region >= self.head.region_count:
            raise RequestError(f"region {region} is not among {self.head.region_count}")
        entries = array("I", layers[0].map_block(region))
        slots = bytearray(SLOT_RUNS[layers[0].slot])
        for layer in layers[1:]:
            below = layer.map_block(region)
            if below != EMPTY_MAP:
                _fill_absent(entries, slots, below, layer.slot)
        entries = entries[start : start + count]
        if 1 in entries or 2 in entries:  # a damaged map: no such entry can be
            entries = array("I", [UNUSABLE if entry in (1, 2) else entry for entry in entries])
        by_slot = {layer.slot: layer for layer in layers}
        data_runs = list(_data_runs(entries, bytes(slots[start : start + count]), first, by_slot))
        if ZEROS in entries:
            _Below(self, parent_id, region).settle(entries, first)
        return entries, data_runs

    @staticmethod
    def _drop_zeros(
        entries: array[int], below: _Below, first: int, target: memoryview, used: int
    ) -> int:
        """Take data that is all zeros out of what `layer_read` has read."""
        read_at = write_at = 4 * len(entries)
        for number, entry in enumerate(entries):
            if entry <= ZEROS:
                continue
            block = target[read_at : read_at + BLOCK_BYTES]
            if entry == ZERO_CHECKSUM and block == ZERO_BLOCK:
                entries[number] = ABSENT if below.is_bare(first + number) else ZEROS
            else:
                target[write_at : write_at + BLOCK_BYTES] = block
                write_at += BLOCK_BYTES
            read_at += BLOCK_BYTES
        assert read_at == used
        return write_at

    def _between(self, layer_id: int, parent_id: int) -> list[LayerInfo]:
        return chain.between(self.metadata.layers, layer_id, parent_id)

    def _layer(self, layer_id: int) -> LayerFile:
        return self._handle(chain.find(self.metadata.layers, layer_id).slot)

    def _undisturbed(self, layout: int) -> bool:
        """Did no layer change since `layout` was noted? The event loop cannot disturb itself."""
        if threading.get_ident() == self._owner_thread:
            return True
        return layout % 2 == 0 and self.layout == layout


class _Below:
    """What a logical layer lies on, in one region; looked up when it is asked for."""

    def __init__(self, logical: Logical, parent_id: int, region: int) -> None:
        self._logical = logical
        self._parent_id = parent_id
        self._region = region
        self._layers: dict[int, LayerFile] = {}
        self._slots: bytes | None = None

    def settle(self, entries: array[int], first: int) -> None:
        """Make zeros above nothing absent; `entries` are those of blocks from `first` on."""
        at = -1
        for _ in range(entries.count(ZEROS)):
            at = entries.index(ZEROS, at + 1)
            if self.is_bare(first + at):
                entries[at] = ABSENT

    def is_bare(self, block: int) -> bool:
        """Does a block read as zeros there?"""
        if not self._parent_id:
            return True
        if self._slots is None:
            infos = chain.chain(self._logical.metadata.layers, self._parent_id)
            self._layers = {info.slot: self._logical._handle(info.slot) for info in infos}
            maps = [(slot, layer.map_block(self._region)) for slot, layer in self._layers.items()]
            self._slots = resolve(maps)
        slot = self._slots[block % BLOCKS_PER_REGION]
        if not slot:
            return True
        layer = self._layers[slot]
        if layer.map_block(self._region)[4 * (block % BLOCKS_PER_REGION) :][:4] != _ZERO_ENTRY:
            return False
        content = memoryview(bytearray(BLOCK_BYTES))
        layer.read(block, 1, content)
        return content == ZERO_BLOCK  # the checksum alone proves nothing


def _fill_absent(entries: array[int], slots: bytearray, below: bytes, slot: int) -> None:
    """Take over from an older layer what the younger ones do not have."""
    present, _ = masks(below)
    mine, _ = masks(entries.tobytes())
    theirs = array("I", below)
    for start, count in runs(present & ~mine):
        entries[start : start + count] = theirs[start : start + count]
        slots[start : start + count] = SLOT_RUNS[slot][:count]


def _data_runs(
    entries: array[int], slots: bytes, first: int, by_slot: dict[int, LayerFile]
) -> Iterator[_Data]:
    """Runs of blocks with data in one file."""
    at, total = 0, len(entries)
    while at < total:
        end = min(total, at + run_length(slots, at))
        while at < end:
            while at < end and entries[at] in (ABSENT, ZEROS):
                at += 1
            start = at
            while at < end and entries[at] not in (ABSENT, ZEROS):
                at += 1
            if start < at:
                yield first + start, at - start, by_slot[slots[start]]
