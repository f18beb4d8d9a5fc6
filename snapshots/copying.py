"""Becoming equal to other members: the receiving side of a rebuild or resync.

`begin_sync` takes over the members' tree; from then on the replica is incomplete, durably: its head
takes writes as usual (zeroing is always recorded explicitly, because what lies below may not be
right yet), reads are refused. `layer_write` replaces blocks of logical layers (logical.py) by those
of another member; `index_zones` and `end_sync` make it readable. A crash in between leaves it
incomplete; what was copied is there and need not be copied again.

Blocks of the head must be copied with writes to them held back (the volume daemon's range lock).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from protocol.checksum import ABSENT
from protocol.errors import RequestError, StateError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGIONS_PER_ZONE
from snapshots import chain, directory
from snapshots.growing import Growing
from snapshots.layer import LayerFile, create_layer, layer_path
from snapshots.masks import SLOT_RUNS, masks, runs
from snapshots.merge import Merged, merge
from snapshots.metadata import LayerInfo, Metadata, check_tree
from snapshots.syscalls import storage_error, sync_directory
from snapshots.zeroed import zeroed_path


class Copying(Growing):
    """See the module text."""

    def begin_sync(
        self,
        tree: Iterable[Mapping[str, Any]],
        head_id: int,
        volume_uuid: str,
        volume_name: str,
        size_bytes: int,
        *,
        fresh: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Take over the logical layers of the members; durably incomplete.

        `tree` has at least id, parent, name, created, labels and removed of every layer. What the
        replica holds is kept, unless `fresh`. Returns the zones that must be compared whatever
        changed elsewhere, its own dirty ones, and the layers that must be compared in all zones,
        because they are new here. StateError: it cannot be kept, take it `fresh`.
        """
        if self._flushes_running:
            raise StateError("a flush is still running; repeat begin_sync after it")
        self.grow(size_bytes)
        wanted = tuple(_layer_info(layer) for layer in tree)
        base = replace(
            self.metadata,
            volume_uuid=volume_uuid,
            volume_name=volume_name,
            size_bytes=self.size_bytes,
            config_seq=self.dirty.config_seq,
            complete=False,
        )
        if fresh:
            layers = tuple(replace(layer, slot=slot) for slot, layer in enumerate(wanted, start=1))
            target = replace(base, layers=layers, head_id=head_id, hollow=True)
            check_tree("the tree to copy", target)
            self._start_empty(target)
            return [], [layer.id for layer in layers]
        merged = merge(base, wanted, head_id)
        check_tree("the tree to copy", merged.metadata)
        return self._start_from_own(merged)

    def _start_empty(self, target: Metadata) -> None:
        """Drop all content. Three durable steps; opening between them finds an empty replica."""
        self._metadata_changed = -1
        self._condemned.clear()
        self.commit(replace(self.metadata, layers=(), head_id=0, complete=False, hollow=True))
        try:
            directory.make_files(self.path, target)
        except OSError as error:
            self.failed = True
            raise storage_error("emptying replica", self.path, error) from error
        except StorageError:
            self.failed = True
            raise
        self._adopt_tree(target)

    def _start_from_own(self, merged: Merged) -> tuple[list[int], list[int]]:
        """Keep what is there. The new layers' files are durable before the tree names them; the
        zones where the live chain changes are dirty before it does."""
        old, target = self.metadata, merged.metadata
        self.flush()  # the head of before may become a sealed layer
        before = {info.id for info in chain.chain(old.layers, old.head_id)}
        after = {info.id for info in chain.chain(target.layers, target.head_id)}
        self.mark_dirty(self._zones_of((before ^ after) - set(merged.made)))
        self._make_layers(merged.made)
        unwanted = [(info.id, self.handles[info.slot]) for info in merged.dropped]
        self._adopt_tree(target)
        for layer_id, handle in unwanted:
            self.condemn(layer_id, handle)
        if old.head_id != target.head_id:
            self._condemned.append((zeroed_path(layer_path(self.path, old.head_id)), None))
        self.adopt(self.metadata)  # durable already; the next flush removes what is not needed
        new = [info.id for info in target.layers] if target.hollow else list(merged.made)
        return self.dirty.dirty_zones(), new

    def _make_layers(self, layer_ids: Iterable[int]) -> None:
        """Empty layer files, durably; none is left if there is no space."""
        made = []
        try:
            for layer_id in layer_ids:
                path = layer_path(self.path, layer_id)
                create_layer(path, layer_id, self.size_bytes, self.metadata.replica_uuid)
                made.append(path)
                directory.sync_file(path)
            sync_directory(os.path.join(self.path, "layers"))
        except (OSError, StorageError) as error:
            for path in made:
                os.unlink(path)
            if isinstance(error, OSError):
                raise storage_error("making layers of", self.path, error) from error
            raise

    def _adopt_tree(self, target: Metadata) -> None:
        """Commit to a tree whose files are there, and open them."""
        self._open_anew(target)
        self._clearable = dict.fromkeys(self.dirty.dirty_zones(), 0)
        self.content_replaced()

    def _zones_of(self, layer_ids: Iterable[int]) -> set[int]:
        """The zones in which layers have anything."""
        regions: set[int] = set()
        for layer_id in layer_ids:
            regions.update(self._layer(layer_id).regions())
        return {region // REGIONS_PER_ZONE for region in regions}

    def layer_write(
        self, layer_id: int, parent_id: int, first: int, entries: memoryview, data: memoryview
    ) -> None:
        """Make blocks of one region of a logical layer what `layer_read` gave elsewhere.

        `entries` are u32, `data` that of the blocks whose entry is a checksum (checked by the
        caller). Absent blocks are taken away, from the whole group of layers.
        """
        self.check_open()
        if self.complete:
            raise StateError("layers are only written while the replica is incomplete")
        count, region = len(entries), first // BLOCKS_PER_REGION
        start = first % BLOCKS_PER_REGION
        end = start + count
        if not count or first < 0 or end > BLOCKS_PER_REGION or region >= self.head.region_count:
            raise RequestError(f"blocks {first} to {first + count} are not of one region")
        present, with_data = masks(_whole_region(entries, start))
        if data.nbytes != with_data.bit_count() // 8 * BLOCK_BYTES:
            raise RequestError(f"{data.nbytes} bytes of data do not fit the map entries")
        group = self._between(layer_id, parent_id)
        layer = self._layer(layer_id)
        self._refuse_shared(layer)
        self.mark_dirty([region // REGIONS_PER_ZONE])
        layer.make_writable(region)
        base, used = region * BLOCKS_PER_REGION, 0
        for at, length in runs(with_data):
            size = length * BLOCK_BYTES
            layer.write(base + at, data[used : used + size])
            used += size
        if layer is self.head:
            self._note_in_head(region, present, with_data, (1 << count * 8) - 1 << start * 8)
        layer.store(first, entries)
        written = ((1 << count * 8) - 1) << start * 8
        for at, length in runs(written & ~with_data):
            layer.punch(base + at, length)
        self.changed(layer)
        for info in group[1:]:
            self._take_away(info, region, written & ~present)
        self.layers_changed()

    def _take_away(self, info: LayerInfo, region: int, mask: int) -> None:
        """Blocks that are absent from a group must not be in its removed layers either."""
        layer = self._layer(info.id)
        present, _ = masks(layer.map_block(region))
        if not present & mask:
            return
        if len(chain.children(self.metadata.layers, info.id)) > 1:
            raise StateError(
                f"layer {info.id} of {self.path} holds blocks for several others that the members "
                "do not have; the replica must be filled anew"
            )
        self._refuse_shared(layer)
        layer.make_writable(region)
        base = region * BLOCKS_PER_REGION
        for at, length in runs(present & mask):
            layer.store(base + at, memoryview(array("I", [ABSENT]) * length))
            layer.punch(base + at, length)
        self.changed(layer)

    @staticmethod
    def _refuse_shared(layer: LayerFile) -> None:
        if layer.shared:
            raise StateError(
                f"layer {layer.path} differs from that of the members and belongs to a clone, too; "
                "the replica must be filled anew"
            )

    def _note_in_head(self, region: int, present: int, with_data: int, written: int) -> None:
        """ZEROS entries are marked, and the index says what the head holds, as for its own."""
        base = region * BLOCKS_PER_REGION
        if self.layered and present & ~with_data:
            self.marks.make_writable(region // REGIONS_PER_ZONE)
            for start, count in runs(present & ~with_data):
                self.marks.mark(base + start, count, durable=False)
        for start, count in runs(with_data):
            self._index[base + start : base + start + count] = SLOT_RUNS[self._head_slot][:count]
        for start, count in runs(written & ~with_data):
            self._index[base + start : base + start + count] = SLOT_RUNS[0][:count]

    def index_zone(self, zone: int) -> None:
        """Make the index page of a dirty zone from the maps."""
        self.index.make_writable(zone)
        first = zone * REGIONS_PER_ZONE
        for region in range(first, min(first + REGIONS_PER_ZONE, self.head.region_count)):
            self.rebuild_index(region)

    def sync_tables(self) -> None:
        """Make index and dirty log durable; any thread, after a flush."""
        try:
            self.index.sync()
            self.dirty.sync()
        except OSError as error:
            self.failed = True
            raise storage_error("syncing the index of", self.path, error) from error

    def end_sync(self) -> None:
        """Readable from now on, durably.

        All has been copied, flushed, every dirty zone indexed and `sync_tables` done since.
        """
        if not self.complete:
            self.commit(replace(self.metadata, complete=True, hollow=False))
            self.complete = True
            self._refresh_layered()


def _whole_region(entries: memoryview, start: int) -> bytes:
    """Entries of some blocks as the map block of a region."""
    block = array("I", bytes(BLOCK_BYTES))
    block[start : start + len(entries)] = array("I", entries)
    return block.tobytes()


def _layer_info(layer: Mapping[str, Any]) -> LayerInfo:
    """A layer of the members' tree; its slot here is not known yet."""
    return LayerInfo(
        id=int(layer["id"]),
        slot=0,
        parent=int(layer["parent"]),
        name=str(layer["name"]),
        created=str(layer["created"]),
        labels=dict(layer["labels"]),
        removed=bool(layer["removed"]),
    )
