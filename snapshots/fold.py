"""Folding: a deleted snapshot's layer gives its blocks to its only child and disappears.

Runs in the event loop in small steps with I/O going on, and waits for flushes instead of syncing by
itself. A batch of blocks of the removed layer P goes through three stages towards the child C:

1. data of blocks that C lacks is copied to C's file (C's map does not name it yet);
   ... a flush makes the copy durable, and with it everything C had before ...
2. C's map entries are stored unless C got its own meanwhile, index bytes of P become C's, blocks
   of P that C had before stage 1 are cleared and punched. A copy whose data is not what the entry
   says (a write to the head that ran out of space went over it) is forgotten and made again;
   ... a flush makes the entries durable; the zone is dirty, so the index needs no sync ...
3. the copied blocks of P are cleared and punched.

So at any moment each block is readable, durably, in P or in C, and at most one batch of space is
used twice. Left over entries of P after a power cut are shadowed by C and go when folding resumes.
A block of P that does not match its entry stays where it is, and P with it, until it was mended.
A removed layer with several children waits until one is left; one without any is dropped at once.

A file that another directory has, too (cloning.py), stays as it is: its layer waits until the other
one is gone. With `unshare` P gives its blocks even so, and keeps them: nothing in P is cleared, and
what C has already counts as copied.

Nothing is remembered across restarts: a layer being folded is a removed layer with fewer blocks.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from protocol.checksum import ABSENT, ZEROS, block_checksum
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE, REGIONS_PER_ZONE
from snapshots import chain
from snapshots.datapath import DataPath
from snapshots.layer import LayerFile, is_shared, layer_path
from snapshots.metadata import LayerInfo
from snapshots.reserve import FULL_DISK

LOOKED_AT_MAX = 64  # parts of a region in one step in which there is nothing to do


@dataclass
class Batch:
    """Blocks of one region on their way from P to C."""

    first_block: int
    entries: list[int]  # P's entries at stage 1; ABSENT: nothing here, or not taken over
    moved: list[bool]  # C had no entry at stage 1


class Folder:
    """The state of folding in one replica; `reset` forgets it safely at any time."""

    def __init__(self, store: DataPath) -> None:
        self._store = store
        self._stuck: set[int] = set()  # ids of layers that hold a damaged block
        self.reset()

    def reset(self) -> None:
        """Start over with whatever the tree says."""
        self._parent: LayerInfo | None = None
        self._child: LayerInfo | None = None
        self._keep = False  # P's file is another directory's, too
        self._next_block = 0
        self._copied: list[Batch] = []  # stage 1 done
        self._stored: list[Batch] = []  # stage 2 done
        self._flush_needed = 0  # sequence number

    def start_over(self) -> None:
        """Content was replaced from outside: nothing that was found out counts."""
        self._stuck.clear()
        self.reset()

    @property
    def waiting(self) -> bool:
        """The next step needs a flush that has begun after the last one."""
        return self._store.flushes_done < self._flush_needed

    def done_of(self, layer_id: int) -> float:
        """Which part of a layer has been copied, 0 to 1, if it is the one in work and is kept."""
        if not self._keep or self._parent is None or self._parent.id != layer_id:
            return 0.0
        return min(1.0, self._next_block / self._store.block_count)

    def step(self, budget_blocks: int) -> bool:
        """Do at most one batch per stage; True if there is more to do."""
        store = self._store
        if self.waiting:
            return True
        self._choose()
        if self._parent is None or self._child is None:
            return False
        parent, child = store.layer_file(self._parent.id), store.layer_file(self._child.id)
        for batch in self._stored:
            self._clear(parent, batch, moved=True)
        self._stored = []
        for batch in self._copied:
            self._store_entries(batch, parent, child)
        self._stored, self._copied = self._copied, []
        if self._stored:
            self._changed(child)  # now: what follows may fail, and P must wait for a flush even so
        batch_next, stalled = None, False
        for budget in (budget_blocks, 16, 1):
            try:
                batch_next = self._copy(parent, child, min(budget, budget_blocks))
            except StorageError as error:
                if error.errno not in FULL_DISK:
                    raise
                stalled = True  # the smallest step did not fit either, if it stays so
                store.file.reserve.release()
            else:
                stalled = False
                break
        if batch_next is not None:
            self._copied.append(batch_next)
        if self._stored or self._copied:
            self._changed(child)
            return True
        if stalled:
            return False
        if self._parent.id in self._stuck:
            self.reset()
        else:
            self._drop(self._parent)
        return True

    def _changed(self, child: LayerFile) -> None:
        """C's file is different: the next step waits for a flush that begins from now on."""
        self._store.changed(child)
        self._store.layers_changed()
        self._flush_needed = self._store.flushes_begun + 1

    def _choose(self) -> None:
        """Pick a removed layer with at most one child; drop it here if it has none."""
        store = self._store
        while True:
            layers = store.metadata.layers
            if self._parent is not None and self._child is not None:
                current = [layer for layer in layers if layer.id == self._parent.id]
                if [layer.id for layer in chain.children(layers, self._parent.id)] == [
                    self._child.id
                ] and current == [self._parent]:
                    return
                self.reset()
            for layer, below in chain.removed(layers):
                if layer.id not in self._stuck and self._may_fold(layer, below):
                    self._parent, self._child = layer, below
                    break
            else:
                return
            if self._child is None:
                self._drop(layer)

    def _may_fold(self, parent: LayerInfo, child: LayerInfo | None) -> bool:
        """Do the files allow it?"""
        if child is None:
            return True
        store = self._store
        self._keep = is_shared(layer_path(store.path, parent.id))
        if self._keep and not store.metadata.unshare:
            return False
        return not is_shared(layer_path(store.path, child.id))

    def _drop(self, layer: LayerInfo) -> None:
        """Take a layer that nobody needs out of the tree; its file goes with the next flush."""
        store = self._store
        store.condemn(layer.id, store.forget_slot(layer.slot))
        store.adopt_without(layer)
        self.reset()

    def _copy(self, parent: LayerFile, child: LayerFile, budget_blocks: int) -> Batch | None:
        """Stage 1 for the next batch; None when P is empty from here on."""
        assert self._parent is not None
        left = LOOKED_AT_MAX
        while True:
            region = parent.next_region(self._next_block // BLOCKS_PER_REGION)
            if region < 0:
                return None
            first = max(self._next_block, region * BLOCKS_PER_REGION)
            count = min(budget_blocks, (region + 1) * BLOCKS_PER_REGION - first)
            start = (first % BLOCKS_PER_REGION) * 4
            entries = array("I", parent.map_block(region)[start : start + count * 4])
            theirs = array("I", child.map_block(region)[start : start + count * 4])
            moved = [bool(mine) and not their for mine, their in zip(entries, theirs, strict=True)]
            left -= 1
            if any(moved) or not left or (any(entries) and not self._keep):
                break
            self._next_block = first + count
        if any(moved):
            child.make_writable(region)
            self._prepare_head(child, first)
        at = 0
        while at < count:
            end = at + 1
            if moved[at] and entries[at] > ZEROS:
                while end < count and moved[end] and entries[end] > ZEROS:
                    end += 1
                data = memoryview(bytearray((end - at) * BLOCK_BYTES))
                parent.read(first + at, end - at, data)
                self._leave_damaged(data, entries, moved, at)
                child.write(first + at, data)
            at = end
        self._next_block = first + count
        return Batch(first, list(entries), moved)

    def _leave_damaged(
        self, data: memoryview, entries: array[int], moved: list[bool], start: int
    ) -> None:
        """Take blocks that do not match their entries out of a batch: a copy would be no better."""
        assert self._parent is not None
        for at in range(0, len(data), BLOCK_BYTES):
            number = start + at // BLOCK_BYTES
            if block_checksum(data[at : at + BLOCK_BYTES]) != entries[number]:
                entries[number], moved[number] = ABSENT, False
                self._stuck.add(self._parent.id)

    def _prepare_head(self, child: LayerFile, block: int) -> None:
        """Allocate what stage 2 stores to, so that it cannot run out of space."""
        zone = block // BLOCKS_PER_ZONE
        self._store.mark_dirty([zone])
        if child is self._store.head:
            self._store.marks.make_writable(zone)

    def _store_entries(self, batch: Batch, parent: LayerFile, child: LayerFile) -> None:
        """Stage 2."""
        assert self._parent is not None
        store = self._store
        region = batch.first_block // BLOCKS_PER_REGION
        if any(batch.moved):
            store.mark_dirty([region // REGIONS_PER_ZONE])
            child.make_writable(region)
            self._forget_damaged(batch, child)
        shift = (region << 20) + 1024  # layer.entry_number
        index = store.index.memory
        for number, entry in enumerate(batch.entries):
            block = batch.first_block + number
            if not batch.moved[number] or child.map[block + shift] != ABSENT:
                continue
            if entry == ABSENT:
                continue
            if entry == ZEROS:
                if self._parent.parent == 0:
                    continue  # nothing beneath: absent reads the same
                if child is store.head:
                    store.marks.make_writable(block // BLOCKS_PER_ZONE)
                    store.marks.mark(block, 1, durable=False)
            child.map[block + shift] = entry
            if index[block] == parent.slot:
                index[block] = child.slot
        self._clear(parent, batch, moved=False)

    def _clear(self, parent: LayerFile, batch: Batch, *, moved: bool) -> None:
        if not self._keep:
            _clear(parent, batch, moved=moved)

    def _forget_damaged(self, batch: Batch, child: LayerFile) -> None:
        """Drop from a batch the copies that C's file no longer holds; they are made again."""
        shift = ((batch.first_block // BLOCKS_PER_REGION) << 20) + 1024
        data = memoryview(bytearray(len(batch.entries) * BLOCK_BYTES))
        child.read(batch.first_block, len(batch.entries), data)
        for number, entry in enumerate(batch.entries):
            block = batch.first_block + number
            if entry <= ZEROS or not batch.moved[number] or child.map[block + shift] != ABSENT:
                continue
            if block_checksum(data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]) != entry:
                batch.entries[number] = ABSENT
                self._next_block = min(self._next_block, block)


def _clear(parent: LayerFile, batch: Batch, *, moved: bool) -> None:
    """Clear and punch the moved, or the shadowed, blocks of a batch in P."""
    region = batch.first_block // BLOCKS_PER_REGION
    parent.make_writable(region)
    shift = (region << 20) + 1024
    at, count = 0, len(batch.entries)
    while at < count:
        end = at + 1
        if batch.entries[at] != ABSENT and batch.moved[at] == moved:
            while end < count and batch.entries[end] != ABSENT and batch.moved[end] == moved:
                end += 1
            first = batch.first_block + at
            for block in range(first, first + end - at):
                parent.map[block + shift] = ABSENT
            parent.punch(first, end - at)
        at = end
