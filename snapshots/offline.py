"""A replica directory looked at without a daemon: nothing in it is changed.

What a crash left is not repaired as opening does it, only understood the same way: in a zone that
is dirty after an unclean end, a block of the head whose data does not match its entry was being
written; its data counts, and where that is all zeros the mark decides (recovery.py).

The directory is locked meanwhile, so no daemon runs on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType

from protocol.checksum import ABSENT, ZEROS, block_checksum
from protocol.errors import NotFoundError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES, REGIONS_PER_ZONE
from snapshots import chain, directory
from snapshots.dirty import CLEAN, DirtyLog
from snapshots.layer import LayerFile, check_layer, layer_path, next_region
from snapshots.masks import EMPTY_MAP, runs, span
from snapshots.metadata import LayerInfo, Metadata, MetadataFile
from snapshots.zeroed import ZeroedMarks

_ZERO_BLOCK = bytes(BLOCK_BYTES)

Damaged = tuple[int, int]
"""layer id and block"""


class OfflineReplica:
    """The layers of one directory; raises StorageError if that is no replica at all."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = MetadataFile(path)
        self.file.read()
        self._lock_fd = directory.lock(path)
        try:
            durable = self.file.read()
            self.metadata: Metadata = self.file.read_pending() or durable
            self.layers: dict[int, LayerFile] = {}
            self.missing: dict[int, str] = {}  # layers that cannot be used, and why
            for info in self.metadata.layers:
                self._open(info)
            self.size_bytes = self.metadata.size_bytes
            self.block_count = self.size_bytes // BLOCK_BYTES
            self.region_count = -(-self.size_bytes // REGION_BYTES)
            self.zone_count = -(-self.region_count // REGIONS_PER_ZONE)
            self._marks = ZeroedMarks(layer_path(path, self.metadata.head_id), self.block_count)
            self.dirty: DirtyLog | None = None
            self.dirty_error = ""
            try:
                self.dirty = DirtyLog(os.path.join(path, "dirty.log"), self.zone_count)
            except StorageError as error:
                self.dirty_error = str(error)
        except BaseException:
            self.close()
            raise

    def _open(self, info: LayerInfo) -> None:
        path, size = layer_path(self.path, info.id), self.metadata.size_bytes
        try:
            check_layer(path, info.id, size, info.origin or self.metadata.replica_uuid)
            self.layers[info.id] = LayerFile(path, info.slot, size)
        except StorageError as error:
            self.missing[info.id] = str(error)

    def __enter__(self) -> OfflineReplica:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the directory again."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def snapshot(self, name: str) -> int:
        """The layer of a snapshot; "" is the live volume."""
        if not name:
            return self.metadata.head_id
        for info in self.metadata.layers:
            if info.name == name and not info.removed:
                return info.id
        names = ", ".join(info.name for info in self.metadata.layers if info.name) or "none"
        raise NotFoundError(f"replica {self.path} has no snapshot {name}; it has: {names}")

    def is_settled(self, region: int) -> bool:
        """Can blocks of the head not have been under way when the last process ended?"""
        if self.metadata.clean:
            return True
        zone = region // REGIONS_PER_ZONE
        return self.dirty is not None and self.dirty.zones[zone] == CLEAN

    def view(self, layer_id: int) -> list[LayerFile]:
        """The layers that a snapshot or the live volume is read from, youngest first."""
        infos = chain.chain(self.metadata.layers, layer_id)
        for info in infos:
            if info.id in self.missing:
                raise StorageError(self.missing[info.id])
        return [self.layers[info.id] for info in infos]

    def regions(self, layer_id: int) -> Iterator[int]:
        """Regions in which a view may have data, in order."""
        layers = self.view(layer_id)
        region = next_region(layers, 0)
        while region >= 0:
            yield region
            region = next_region(layers, region + 1)

    def read_region(
        self, layer_id: int, region: int, target: memoryview
    ) -> tuple[list[Damaged], int]:
        """One region as a view shows it: damaged blocks, and the mask of those that have data.

        `target` gets the data of blocks that have some; the bytes of others are left alone.
        """
        open_blocks = set(range(BLOCKS_PER_REGION))
        damaged: list[Damaged] = []
        has_data = 0
        for layer in self.view(layer_id):
            content = layer.map_block(region)
            if content == EMPTY_MAP or not open_blocks:
                continue
            entries = memoryview(content).cast("I")
            for number in sorted(open_blocks):
                entry = entries[number]
                if entry == ABSENT:
                    continue
                block = region * BLOCKS_PER_REGION + number
                if entry == ZEROS:
                    open_blocks.discard(number)
                    continue
                data = target[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                state = self._read(layer, block, entry, data)
                if state == ABSENT:
                    continue
                open_blocks.discard(number)
                if state < 0:
                    damaged.append((self._id_of(layer), block))
                elif state != ZEROS:
                    has_data |= span(number, 1)
        return damaged, has_data

    def _read(self, layer: LayerFile, block: int, entry: int, data: memoryview) -> int:
        """Read one block: ABSENT, ZEROS, something above that, or below 0 if it is damaged."""
        try:
            layer.read(block, 1, data)
        except StorageError:
            return -1
        if block_checksum(data) == entry:
            return entry
        is_head = self._id_of(layer) == self.metadata.head_id
        if not is_head or self.is_settled(block // BLOCKS_PER_REGION):
            return -1
        if data != _ZERO_BLOCK:
            return ZEROS + 1  # it was being written
        return ZEROS if self._marks.marked(block) else ABSENT

    def _id_of(self, layer: LayerFile) -> int:
        return next(info.id for info in self.metadata.layers if info.slot == layer.slot)


def export(
    replica: OfflineReplica, snapshot: str, target_path: str, *, skip_damaged: bool = False
) -> tuple[int, list[Damaged]]:
    """Write a view as a sparse raw file, which must not exist; bytes of data, damaged blocks.

    A damaged block ends it with StorageError, and no file, unless `skip_damaged`: then it is left
    out, which reads as zeros.
    """
    layer_id = replica.snapshot(snapshot)
    buffer = memoryview(bytearray(REGION_BYTES))
    written, all_damaged = 0, []
    with open(target_path, "xb", buffering=0) as target:
        try:
            os.truncate(target.fileno(), replica.size_bytes)
            for region in replica.regions(layer_id):
                damaged, has_data = replica.read_region(layer_id, region, buffer)
                if damaged and not skip_damaged:
                    layer, block = damaged[0]
                    raise StorageError(
                        f"block {block} (layer {layer}) of replica {replica.path} is damaged; "
                        "export another replica, or leave damaged blocks out"
                    )
                all_damaged += damaged
                for start, count in runs(has_data):
                    data = buffer[start * BLOCK_BYTES : (start + count) * BLOCK_BYTES]
                    offset = region * REGION_BYTES + start * BLOCK_BYTES
                    while data:
                        done = os.pwrite(target.fileno(), data, offset)
                        data, offset = data[done:], offset + done
                    written += count * BLOCK_BYTES
            os.fsync(target.fileno())
        except BaseException:
            os.unlink(target_path)
            raise
    return written, all_damaged
