"""The open files of a replica, its tables, and how changes become durable.

Base of `DataPath` and `Replica`; used from the event loop only, apart from what the flush job does.

Invariants:
- `handles[slot]` is the open file of a layer or None; sealed layers are opened on first use and the
  oldest opened ones are dropped when more than MAPPED_BYTES_MAX of address space is mapped.
- `layout` changes with every change of what a slot number means; a thread that read with an older
  layout throws its result away. It is odd while such a change is going on, and even otherwise.
- A change of the tree by `seal` or at the end of folding is adopted at once and becomes durable
  with the next flush (`metadata_pending`); until then replica.pending.json tells of a seal. All
  other changes of replica.json are durable before they are adopted (`commit`), after a flush if one
  is pending, so replica.json never names a sealed layer whose data is not durable.
- A layer in `unsynced` holds changes no completed flush covers. The head is part of every flush.
- A flush that begins when nothing was written since the last completed one does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import replace

from protocol.checksum import crc32c
from protocol.errors import StateError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE
from snapshots import chain, distrust
from snapshots.dirty import COOL, DirtyLog
from snapshots.flush import FlushJob, failed_error, remove_files
from snapshots.index import Index
from snapshots.layer import LayerFile, file_bytes, layer_path
from snapshots.metadata import LayerInfo, Metadata, MetadataFile
from snapshots.reserve import FULL_DISK
from snapshots.syscalls import nowait_flag
from snapshots.zeroed import ZeroedMarks, zeroed_path

MAPPED_BYTES_MAX = 112 << 40  # of the 128 TiB a process on x86-64 can address
FLUSHES_PER_INDEX_SYNC = 64  # an index sync costs a second fdatasync and only saves recovery work


class Store:
    """See the module text."""

    def __init__(self, path: str, file: MetadataFile, metadata: Metadata, lock_fd: int) -> None:
        self.path = path
        self.file = file
        self.failed = False
        self.clean_start = metadata.clean
        self.index_errors = 0  # pages of the index that were damaged and made anew
        self.recovered_zones: list[int] = []  # zones that were dirty when it was opened
        # Zones become clean only after `stable`; a replica that nobody shares is always stable.
        self.shared = False
        self._stable_flush = -1
        self._stable_config = 0
        self._lock_fd = lock_fd
        self._owner_thread = threading.get_ident()
        self.flushes_begun = 0
        self.flushes_done = 0  # the highest sequence number that succeeded
        self._flushes_running = 0
        self.layout = 0
        self.nowait_flag = nowait_flag(path)
        self._load(metadata)

    @property
    def closed(self) -> bool:
        """The directory may belong to another process."""
        return self._lock_fd < 0

    def check_open(self) -> None:
        """Refuse to touch a directory that was given free."""
        if self._lock_fd < 0:
            raise StateError(f"replica {self.path} was closed; open it again")

    def _load(self, metadata: Metadata) -> None:
        """Open all files of a tree; the caller has checked that they belong together."""
        self.metadata = metadata
        self.size_bytes = metadata.size_bytes
        self.block_count = metadata.size_bytes // BLOCK_BYTES
        zone_count = -(-self.block_count // BLOCKS_PER_ZONE)
        self.index = Index(os.path.join(self.path, "index"), self.block_count)
        self.dirty = DirtyLog(os.path.join(self.path, "dirty.log"), zone_count)
        self.handles: list[LayerFile | None] = [None] * 256
        self._opened: list[LayerFile] = []  # sealed layers, oldest first
        self.views: dict[tuple[int, int], bytes] = {}  # (layer, region) to slots, see DataPath
        self.unsynced: dict[LayerFile, int] = {}  # layer to flushes_begun when it changed
        self._names_changed = -1  # flushes_begun when layer files were created, -1 = durable
        self._metadata_changed = -1  # the same for the adopted tree
        self._condemned: list[tuple[str, LayerFile | None]] = []
        # Zones whose writes are durable, their index page perhaps not, and the flush that made so.
        self._clearable: dict[int, int] = {}
        self._index_wanted = False
        self._index = self.index.memory
        self._index_ready = self.index.ready
        self._zones = self.dirty.zones
        self._adopt_head(*self._open_head(metadata))

    def _open_head(self, metadata: Metadata) -> tuple[LayerFile, ZeroedMarks]:
        """Open the files of the head that `metadata` names; nothing changes yet."""
        info = chain.find(metadata.layers, metadata.head_id)
        path = layer_path(self.path, info.id)
        head = LayerFile(path, info.slot, self.size_bytes)
        return head, ZeroedMarks(path, self.block_count)

    def _adopt_head(self, head: LayerFile, marks: ZeroedMarks) -> None:
        """Point the data path's shortcuts at the head named by the metadata; cannot fail."""
        self.head, self.marks = head, marks
        self.handles[head.slot] = head
        self.complete = self.metadata.complete
        self.layered = True
        self._refresh_layered()
        self._head_fd = self.head.fd
        self._head_map = self.head.map
        self._head_ready = self.head.ready
        self._head_slot = head.slot

    def _refresh_layered(self) -> None:
        """Whether anything can lie below the head: it has a parent, durably, or may get one."""
        head = chain.find(self.metadata.layers, self.metadata.head_id)
        if not self.metadata_pending:
            self.layered = head.parent != 0 or not self.complete

    def zones_recovered(self) -> None:
        """Recovery has made its zones durable: they may be cleared once they are stable."""
        self._clearable = dict.fromkeys(self.recovered_zones, 0)

    # Layers

    def layer_file(self, layer_id: int) -> LayerFile:
        """The open file of a layer."""
        slot = chain.find(self.metadata.layers, layer_id).slot
        return self.handles[slot] or self.open_slot(slot)

    def open_slot(self, slot: int) -> LayerFile:
        """Open the sealed layer in a slot and remember it."""
        layer_bytes = file_bytes(self.size_bytes)
        while self._opened and (len(self._opened) + 2) * layer_bytes > MAPPED_BYTES_MAX:
            self._close_oldest()
        while True:
            try:
                handle = self.open_private(slot)
                break
            except StorageError as error:  # addresses may be used up in other ways
                if error.errno != errno.ENOMEM or not self._opened:
                    raise
                self._close_oldest()
        self._opened.append(handle)
        self.handles[slot] = handle
        return handle

    def _close_oldest(self) -> None:
        self.handles[self._opened.pop(0).slot] = None

    def open_private(self, slot: int) -> LayerFile:
        """Open the layer in a slot without remembering it; any thread."""
        for info in self.metadata.layers:
            if info.slot == slot:
                return LayerFile(layer_path(self.path, info.id), slot, self.size_bytes)
        raise StorageError(
            f"index of {self.path} names slot {slot}, which no layer has; rebuild this replica"
        )

    def forget_slot(self, slot: int) -> LayerFile | None:
        """Drop the open file of a slot from the tables and return it."""
        handle = self.handles[slot]
        self.handles[slot] = None
        if handle in self._opened:
            self._opened.remove(handle)
        if handle is not None:
            self.unsynced.pop(handle, None)
        return handle

    def layers_changed(self) -> None:
        """What slots mean, or what sealed layers hold, is different from now on."""
        self.layout += 2
        self.views.clear()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change during which index and tables do not agree: threads do not read."""
        self.layout += 1
        try:
            yield
        finally:
            self.layout += 1
            self.views.clear()

    def changed(self, layer: LayerFile) -> None:
        """A layer other than by the head's data path was written to; the next flush covers it."""
        self.unsynced[layer] = self.flushes_begun

    # Metadata

    @property
    def metadata_pending(self) -> bool:
        """The adopted tree is not durable yet."""
        return self._metadata_changed >= 0

    def adopt(self, metadata: Metadata) -> None:
        """Take over a new tree now; it is durable after the next flush."""
        self.metadata = metadata
        self._metadata_changed = self.flushes_begun

    def adopt_without(self, layer: LayerInfo) -> None:
        """Take over the tree without a layer whose blocks nobody needs."""
        layers = chain.without(self.metadata.layers, layer.id)
        self.adopt(replace(self.metadata, layers=layers))
        self.layers_changed()

    def commit(self, metadata: Metadata) -> None:
        """Make metadata durable, then take it over; on failure the old one stays.

        `metadata` must not depend on a pending change being absent: a flush may come first.
        """
        self.check_open()
        self.settle()
        try:
            self.file.write(self.file.compose(metadata))
        except StorageError as error:
            self.failed = self.failed or error.errno not in FULL_DISK
            raise
        self.metadata = metadata

    def settle(self) -> None:
        """Flush if the adopted tree is not durable yet."""
        if self.metadata_pending:
            self.flush()

    def condemn(self, layer_id: int, handle: LayerFile | None) -> None:
        """Remove a layer's file once the adopted tree, which must not name it, is durable."""
        path = layer_path(self.path, layer_id)
        self._condemned.append((path, handle))
        self._condemned.append((zeroed_path(path), None))

    # Dirty zones

    def stable(self, flush_number: int, config_seq: int) -> None:
        """Everything that flush made durable here is durable on every member of `config_seq`."""
        self._stable_flush = max(self._stable_flush, flush_number)
        self._stable_config = max(self._stable_config, config_seq)

    def _stable_zones(self) -> dict[int, int]:
        """Zones that can be cleared once the index is durable, and the flush that made them so.

        None while the replica is incomplete: the next attempt to make it equal must compare them.
        """
        if not self.complete:
            return {}
        zones, stable = self._zones, self._stable_flush
        return {
            zone: at
            for zone, at in self._clearable.items()
            if zones[zone] == COOL and (at <= stable or not self.shared)
        }

    def _clear(self, zones: list[int]) -> None:
        """Make zones clean whose index pages are durable."""
        checksums = {zone: crc32c(self.index.page(zone)) for zone in zones}
        self.dirty.clear(checksums, self._stable_config)
        for zone in zones:
            self._clearable.pop(zone, None)

    # Flush

    def flush_begin(self) -> FlushJob:
        """Collect what must become durable. Event loop; run the job in any thread."""
        self.check_open()
        if self.failed:
            raise failed_error(self.path)
        self.flushes_begun += 1
        job = FlushJob(self, self.flushes_begun)
        self._flushes_running += 1
        cooled = job.cooled = self.dirty.cool()
        for zone in cooled:
            self._clearable.pop(zone, None)
        nothing = not (cooled or self.unsynced or self.metadata_pending)
        due = self._index_wanted or self.flushes_begun % FLUSHES_PER_INDEX_SYNC == 0
        job.clearable = self._stable_zones() if due else {}
        if job.clearable:
            job.index = self.index
        else:
            self._index_wanted = False
        if nothing and self._flushes_running == 1:
            return job
        job.layers = [self.head, *(layer for layer in self.unsynced if layer is not self.head)]
        if self.marks.changes != self.marks.synced_changes:
            job.marks, job.marks_changes = self.marks, self.marks.changes
        job.sync_names = self._names_changed >= 0
        if self.metadata_pending:
            job.metadata = self.file.compose(self.metadata)
            job.condemned = [path for path, _ in self._condemned]
            job.holds = [handle for _, handle in self._condemned if handle is not None]
            self._condemned = [(path, None) for path, _ in self._condemned]
        return job

    def flush_end(self, job: FlushJob) -> None:
        """Take note of a finished job (also of a failed one). Event loop."""
        self._flushes_running -= 1
        if not job.succeeded or self.closed:
            return
        self.file.reserve.refill()
        sequence = job.sequence
        self.flushes_done = max(self.flushes_done, sequence)
        for layer in [layer for layer, at in self.unsynced.items() if at < sequence]:
            del self.unsynced[layer]
        if job.marks is not None:
            job.marks.synced_changes = max(job.marks.synced_changes, job.marks_changes)
        if self._names_changed < sequence:
            self._names_changed = -1
        if self._metadata_changed < sequence:
            self._metadata_changed = -1
            done = set(job.condemned)
            self._condemned = [entry for entry in self._condemned if entry[0] not in done]
            self._refresh_layered()
        if job.index is not None and job.index is self.index:
            self._index_wanted = False
            # Only what no later flush has cooled again: its index page may be younger.
            self._clear([z for z, at in job.clearable.items() if self._clearable.get(z) == at])
        for zone in job.cooled:
            self._clearable[zone] = sequence

    def flush(self) -> None:
        """Make every write so far durable, waiting for the disk."""
        job = self.flush_begin()
        try:
            job.run()
        finally:
            self.flush_end(job)

    # End

    def close(self) -> None:
        """Flush, note the clean stop, give the directory free."""
        if self._lock_fd < 0:
            return
        try:
            if not self.failed:
                self._close_clean()
        finally:
            self.abandon()

    def _close_clean(self) -> None:
        self.flush()
        try:
            self.index.sync()
            self._clear(list(self._stable_zones()))
            self.dirty.sync()
        except OSError as error:
            self.failed = True
            distrust.mark(self.path)
            raise failed_error(self.path) from error
        remove_files([path for path, _ in self._condemned])
        self.commit(replace(self.metadata, clean=True))
        self.file.remove_pending()

    def abandon(self) -> None:
        """Give the directory free and make nothing durable: what a kill -9 leaves behind."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
            self._head_ready = bytearray(len(self._head_ready))  # writes take the slow way: refused
