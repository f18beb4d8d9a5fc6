"""Folding: a deleted snapshot's layer gives its blocks to its only child and disappears.

Runs in the event loop in small steps with I/O going on, and waits for flushes instead of syncing by
itself. The layer P that goes is walked twice. First everything of it that its child C has, too, is
given up; nothing is copied for that, so its space is back soon. Then the rest moves:

1. data of blocks that C lacks is copied to C's file (C's map does not name it yet);
   ... a flush makes the copies durable, and with them everything C had before stage 1 ...
2. C's map entries are stored unless C got its own meanwhile, index bytes of P become C's, blocks
   of P that C had before stage 1 are cleared and punched. A copy whose data is not what the entry
   says (a write to the head that ran out of space went over it) is forgotten and made again;
   ... a flush makes the entries durable; the zone is dirty, so the index needs no sync ...
3. the copied blocks of P are cleared and punched.

So at any moment each block is readable, durably, in P or in C, and at most COLLECT of them take
their space twice. Left over entries of P after a power cut are shadowed by C and go when folding
resumes. A block of P that does not match its entry stays where it is, and P with it, until it was
mended.
A removed layer with several children waits until one is left; one without any is dropped at once.

A file that another directory has, too (cloning.py), stays as it is: its layer waits until the other
one is gone. With `unshare` P gives its blocks even so, and keeps them: nothing in P is cleared, and
what C has already counts as copied.

Nothing is remembered across restarts: a layer being folded is a removed layer with fewer blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.checksum import block_checksum
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE, REGIONS_PER_ZONE
from snapshots import chain
from snapshots.datapath import DataPath
from snapshots.layer import LayerFile, is_shared, layer_path
from snapshots.masks import EMPTY_MAP, masks, runs, span
from snapshots.metadata import LayerInfo
from snapshots.reserve import FULL_DISK

COLLECT = 4096  # cost of what waits for one flush: 16 MiB of copies
LOOK, PUNCH = 8, 64  # cost of looking at a region, of punching; that of copying a block is 1
PUNCHED_MIN = 16  # blocks: shorter runs are not worth a system call of their own
_NOTHING = memoryview(EMPTY_MAP).cast("I")


@dataclass
class Batch:
    """Blocks of one region on their way from P to C, as masks (masks.py)."""

    region: int
    entries: memoryview  # P's map block at stage 1
    moved: int  # C had no entry at stage 1
    data: int  # those of them whose entry is a checksum
    shadowed: int  # C had one

    def drop(self, mask: int) -> None:
        """Some blocks do not move."""
        self.data &= ~mask
        self.moved &= ~mask


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
        self._copying = False  # the second walk
        self._next_block = 0
        self._collected = 0  # cost of what waits for the next flush
        self._closed = False  # nothing is added to it until that flush is done
        self._copied: list[Batch] = []  # stage 1 done
        self._stored: list[Batch] = []  # stage 2 done
        self._flushed: deque[tuple[bool, Batch]] = deque()  # due for stage 3 (True) or stage 2
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

    def step(self, budget: int) -> bool:
        """Work that costs about as much as copying so many blocks; True if there is more to do."""
        if self.waiting:
            return True
        self._choose()
        if self._parent is None or self._child is None:
            return False
        store = self._store
        parent, child = store.layer_file(self._parent.id), store.layer_file(self._child.id)
        if self._closed:
            self._flushed += [(True, batch) for batch in self._stored]
            self._flushed += [(False, batch) for batch in self._copied]
            self._stored, self._copied = [], []
            self._closed, self._collected = False, 0
        cost = 0
        while cost < budget:
            if self._flushed:
                cost += self._finish(*self._flushed[0], parent, child)
                self._flushed.popleft()
                continue
            if self._collected < COLLECT:
                spent = self._collect(parent, child, max(1, budget - cost))
                if spent is None:
                    return False
                if spent:
                    cost += spent
                    continue
            if self._copied or self._stored:
                self._closed = True
                self._flush_needed = store.flushes_begun + 1
                return True
            if self._end_walk(parent):
                return True
        return True

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
                    self._copying = self._keep
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

    def _end_walk(self, parent: LayerFile) -> bool:
        """All of a walk is done and durable; True: so is this layer."""
        assert self._parent is not None
        self._next_block = 0
        if not self._copying:
            self._copying = True
            return False
        if self._parent.id in self._stuck:
            self.reset()
            return True
        if not self._keep and parent.next_region(0) >= 0:
            return False  # a step failed half way: it gets what is left
        self._drop(self._parent)
        return True

    # ---- stage 1 ------------------------------------------------------------------------------

    def _collect(self, parent: LayerFile, child: LayerFile, budget: int) -> int | None:
        """The next batches of this walk; what that cost, 0 at its end, None: no space for one."""
        cost: int | None = None
        for some in (budget, 16, 1):
            try:
                cost = self._copy(parent, child, min(some, budget))
                break
            except StorageError as error:
                if error.errno not in FULL_DISK:
                    raise
                if self._copied or self._stored:
                    return 0  # there is space when these are done
                self._store.file.reserve.release()
        if cost is not None:
            self._collected += cost
        return cost

    def _copy(self, parent: LayerFile, child: LayerFile, budget: int) -> int:
        """Look at what comes next in P, at most a region; copy what has to be."""
        region = parent.next_region(self._next_block // BLOCKS_PER_REGION)
        if region < 0:
            return 0
        base = region * BLOCKS_PER_REGION
        entries = parent.map_block(region)
        mine, mine_data = masks(entries)
        start = mine.to_bytes(BLOCKS_PER_REGION, "little").find(
            0xFF, max(0, self._next_block - base)
        )
        if start < 0:
            self._next_block = base + BLOCKS_PER_REGION
            return LOOK
        count = BLOCKS_PER_REGION - start
        if self._copying:
            count = min(budget, count)
        mine &= span(start, count)
        theirs, _ = masks(child.map_block(region))
        moved, shadowed = mine & ~theirs, mine & theirs
        view = memoryview(entries).cast("I")
        cost = LOOK
        if not self._copying:
            if shadowed:
                self._copied.append(Batch(region, view, 0, 0, shadowed))
        elif moved or not self._keep:
            batch = Batch(region, view, moved, moved & mine_data, shadowed)
            if moved:
                child.make_writable(region)
                self._prepare_head(child, base)
                self._copy_data(parent, child, batch)
                self._changed(child)
            self._copied.append(batch)
            cost += batch.data.bit_count() // 8
        self._next_block = base + start + count
        return cost

    def _copy_data(self, parent: LayerFile, child: LayerFile, batch: Batch) -> None:
        """Copy what matches its entry; a copy of the rest would be no better."""
        assert self._parent is not None
        for block, data, damaged in _read(parent, batch, batch.data):
            if damaged:
                batch.drop(damaged)
                self._stuck.add(self._parent.id)
            child.write(block, data)

    def _prepare_head(self, child: LayerFile, block: int) -> None:
        """Allocate what stage 2 stores to, so that it cannot run out of space."""
        zone = block // BLOCKS_PER_ZONE
        self._store.mark_dirty([zone])
        if child is self._store.head:
            self._store.marks.make_writable(zone)

    def _changed(self, child: LayerFile) -> None:
        self._store.changed(child)
        self._store.layers_changed()

    # ---- stages 2 and 3 -----------------------------------------------------------------------

    def _finish(
        self, entries_stored: bool, batch: Batch, parent: LayerFile, child: LayerFile
    ) -> int:
        """The stage after a flush; what that cost."""
        if entries_stored:
            return LOOK + self._clear(parent, batch.region, batch.moved)
        cost = LOOK
        if batch.moved:
            self._store_entries(batch, parent, child)
            self._stored.append(batch)
            self._changed(child)
            cost += batch.data.bit_count() // 16
        return cost + self._clear(parent, batch.region, batch.shadowed)

    def _store_entries(self, batch: Batch, parent: LayerFile, child: LayerFile) -> None:
        """Stage 2."""
        assert self._parent is not None
        store, base = self._store, batch.region * BLOCKS_PER_REGION
        zone = batch.region // REGIONS_PER_ZONE
        store.mark_dirty([zone])
        child.make_writable(batch.region)
        theirs, _ = masks(child.map_block(batch.region))
        self._forget_damaged(batch, child, batch.data & ~theirs)
        stored = batch.moved & ~theirs
        if self._parent.parent == 0:
            stored &= batch.data  # nothing is beneath: absent reads as zeros, too
        elif child is store.head and stored & ~batch.data:
            store.marks.make_writable(zone)
            for at, length in runs(stored & ~batch.data):
                store.marks.mark(base + at, length, durable=False)
        index = store.index.memory
        takes_over = bytes.maketrans(bytes([parent.slot]), bytes([child.slot]))
        for at, length in runs(stored):
            child.store(base + at, batch.entries[at : at + length])
            slots = index[base + at : base + at + length]
            index[base + at : base + at + length] = slots.translate(takes_over)

    def _forget_damaged(self, batch: Batch, child: LayerFile, copies: int) -> None:
        """Drop from a batch the copies that C's file no longer holds; they are made again."""
        for block, _, damaged in _read(child, batch, copies):
            if damaged:
                batch.drop(damaged)
                self._next_block = min(self._next_block, block)

    def _clear(self, parent: LayerFile, region: int, mask: int) -> int:
        """Take blocks away from P; what that cost.

        The space of short runs comes back with the last block of their region, in one go.
        """
        if self._keep or not mask:
            return 0
        parent.make_writable(region)
        base, cleared = region * BLOCKS_PER_REGION, runs(mask)
        for at, length in cleared:
            parent.store(base + at, _NOTHING[:length])
        self._store.layers_changed()
        long = [run for run in cleared if run[1] >= PUNCHED_MIN]
        if parent.map_block(region) == EMPTY_MAP:
            long = [(0, BLOCKS_PER_REGION)]
        for at, length in long:
            parent.punch(base + at, length)
        return len(cleared) + PUNCH * len(long)


def _read(layer: LayerFile, batch: Batch, mask: int) -> Iterator[tuple[int, memoryview, int]]:
    """Runs of blocks of a batch in one file: the first, their data, the mask of those whose data is
    not what their entries say."""
    base = batch.region * BLOCKS_PER_REGION
    for at, length in runs(mask):
        data = memoryview(bytearray(length * BLOCK_BYTES))
        layer.read(base + at, length, data)
        damaged = 0
        for number, entry in enumerate(batch.entries[at : at + length]):
            if block_checksum(data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]) != entry:
                damaged |= span(at + number, 1)
        yield base + at, data, damaged
