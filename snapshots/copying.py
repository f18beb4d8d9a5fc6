"""Copying whole layers between replicas: what a rebuild reads here and writes there.

The unit is a region of one layer: its 1024 map entries and the data they name. While the target is
incomplete its head takes writes as usual (zeroing is always recorded explicitly, because a parent
not copied yet may hold data), reads are refused, and a crash means starting over with `begin_sync`.

On the source no block may move between layers from the first `layer_regions` to the last
`layer_read`: the caller sets `hold_folding` meanwhile. A region of the head must be copied with
writes to it held back (the range lock of the volume daemon).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from protocol.errors import RequestError, StateError, StorageError
from protocol.units import (
    BLOCK_BYTES,
    BLOCKS_PER_REGION,
    REGION_BYTES,
    REGIONS_PER_ZONE,
    check_size,
)
from snapshots import chain, directory
from snapshots.datapath import DataPath
from snapshots.layer import LayerFile
from snapshots.masks import EVERY_BLOCK, masks, runs
from snapshots.metadata import LayerInfo, check_tree
from snapshots.syscalls import storage_error

LAYER_READ_BYTES_MAX = BLOCK_BYTES + REGION_BYTES


class Copying(DataPath):
    """See the module text."""

    def layer_regions(self, layer_id: int) -> list[int]:
        """Regions of a layer with at least one map entry."""
        return self._layer(layer_id).regions()

    def layer_read(self, layer_id: int, region: int, target: memoryview) -> int:
        """Copy 1024 raw entries, then the data of blocks with a checksum, densely, to `target`.

        Returns the bytes used, at most LAYER_READ_BYTES_MAX.
        """
        layer = self._layer(layer_id)
        self._check_region(layer, region)
        entries = self._without_shadowed(layer_id, region, layer.map_block(region))
        target[:BLOCK_BYTES] = entries
        used = BLOCK_BYTES
        for start, count in runs(masks(entries)[1]):
            length = count * BLOCK_BYTES
            layer.read(region * BLOCKS_PER_REGION + start, count, target[used : used + length])
            used += length
        return used

    def _without_shadowed(self, layer_id: int, region: int, entries: bytes) -> bytes:
        """The entries of a region; of a layer being folded only those its child lacks.

        After a power cut such a layer can name blocks whose data is folded and punched already.
        """
        layers = self.metadata.layers
        below = chain.children(layers, layer_id)
        if not chain.find(layers, layer_id).removed or len(below) != 1:
            return entries
        present, _ = masks(self._handle(below[0].slot).map_block(region))
        kept = array("I", entries)
        for start, count in runs(present):
            kept[start : start + count] = array("I", bytes(count * 4))
        return kept.tobytes()

    def layer_write(
        self, layer_id: int, region: int, entries: memoryview, data: memoryview
    ) -> None:
        """Replace a region of a layer by what `layer_read` gave on another replica."""
        self.check_open()
        layer = self._layer(layer_id)
        self._check_region(layer, region)
        if entries.nbytes != BLOCK_BYTES:
            raise RequestError(f"{entries.nbytes} bytes of map entries, expected {BLOCK_BYTES}")
        present, with_data = masks(bytes(entries))
        expected = with_data.bit_count() // 8 * BLOCK_BYTES
        if data.nbytes != expected:
            raise RequestError(f"{data.nbytes} bytes of data, the map entries name {expected}")
        if self.complete or layer is self.head:
            self.mark_dirty([region // REGIONS_PER_ZONE])
        layer.make_writable(region)
        first_block, used = region * BLOCKS_PER_REGION, 0
        for start, count in runs(with_data):
            length = count * BLOCK_BYTES
            layer.write(first_block + start, data[used : used + length])
            used += length
        if layer is self.head and self.layered:
            self._mark_zeros(region, present & ~with_data)
        layer.store(first_block, entries.cast("B").cast("I"))
        for start, count in runs(EVERY_BLOCK & ~with_data):
            layer.punch(first_block + start, count)
        self.changed(layer)
        self.layers_changed()
        self.content_replaced()
        if self.complete:
            self.rebuild_index(region)

    def _mark_zeros(self, region: int, mask: int) -> None:
        """ZEROS entries that come to the head from outside are marked like its own."""
        self.marks.make_writable(region // REGIONS_PER_ZONE)
        for start, count in runs(mask):
            self.marks.mark(region * BLOCKS_PER_REGION + start, count, durable=False)

    def begin_sync(
        self,
        tree: Iterable[LayerInfo | Mapping[str, Any]],
        head_id: int,
        volume_uuid: str,
        volume_name: str,
        size_bytes: int,
    ) -> None:
        """Drop all content and take over a tree of empty layers; durably incomplete.

        `tree` has at least id, parent, name, created, labels and removed of every layer.
        """
        check_size(size_bytes)
        if self._flushes_running:
            raise StateError("a flush is still running; repeat begin_sync after it")
        layers = tuple(_layer_infos(tree))
        target = replace(
            self.metadata,
            layers=layers,
            head_id=head_id,
            volume_uuid=volume_uuid,
            volume_name=volume_name,
            size_bytes=size_bytes,
            complete=False,
        )
        check_tree("the tree to copy", target)
        # Three durable steps; opening between the first and the last finds an empty replica.
        self._metadata_changed = -1
        self._condemned.clear()
        self.commit(replace(self.metadata, layers=(), head_id=0, complete=False))
        try:
            directory.make_files(self.path, target)
        except OSError as error:
            self.failed = True
            raise storage_error("emptying replica", self.path, error) from error
        except StorageError:
            self.failed = True
            raise
        self.commit(target)
        try:
            with self.changing():
                self._load(target)
        except StorageError:
            self.failed = True
            raise
        self.content_replaced()

    def end_sync(self) -> None:
        """Everything has been copied: build the index and make it all durable."""
        if self.complete:
            return
        layers = chain.chain(self.metadata.layers, self.metadata.head_id)
        regions: set[int] = set()
        for info in layers:
            regions.update(self._layer(info.id).regions())
        self.mark_dirty({region // REGIONS_PER_ZONE for region in regions})
        for region in sorted(regions):
            self.rebuild_index(region)
        self.flush()
        try:
            self.index.sync()
        except OSError as error:
            self.failed = True
            raise storage_error("syncing the index of", self.path, error) from error
        self.commit(replace(self.metadata, complete=True))
        self.complete = True
        self._refresh_layered()

    def content_replaced(self) -> None:
        """Called when content was replaced from outside; for subclasses with state."""

    @staticmethod
    def _check_region(layer: LayerFile, region: int) -> None:
        if not 0 <= region < layer.region_count:
            raise RequestError(f"region {region} is not among the {layer.region_count} there are")

    def _layer(self, layer_id: int) -> LayerFile:
        return self._handle(chain.find(self.metadata.layers, layer_id).slot)


def _layer_infos(tree: Iterable[LayerInfo | Mapping[str, Any]]) -> Iterator[LayerInfo]:
    """The layers of a foreign tree with slots of our own."""
    for slot, layer in enumerate(tree, start=1):
        if isinstance(layer, LayerInfo):
            yield replace(layer, slot=slot, allocated_bytes=0)
            continue
        yield LayerInfo(
            id=int(layer["id"]),
            slot=slot,
            parent=int(layer["parent"]),
            name=str(layer["name"]),
            created=str(layer["created"]),
            labels=dict(layer["labels"]),
            removed=bool(layer["removed"]),
        )
