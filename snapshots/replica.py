"""One replica on disk: what the replica daemon calls.

`Replica` adds opening, the layer tree and background work to the data path (datapath.py) and the
copying of layers (copying.py, mending.py); files and flushes are in store.py.

One thread, the event loop's, calls everything, except: `read_into`, `layer_read`
and `FlushJob.run` may run in another thread.

What is durable when: `write` and `zero` after the next flush; `seal` after the next flush (a power
cut before it goes back to the state at the seal, minus unflushed writes, with the old head; a kill
of the process undoes nothing);
`name_layer`, `remove`, `revert`, `grow`, `promise`, `store_config`, `bind`, `begin_sync` and
`end_sync` on return. Layer ids are never used twice in a volume.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from protocol.errors import ConflictError, NotFoundError, RequestError, StorageError
from protocol.units import REGIONS_PER_ZONE
from snapshots import chain, directory, distrust
from snapshots.cloning import Clone, Target, unsharing_bytes
from snapshots.fold import Folder
from snapshots.layer import create_layer, layer_path
from snapshots.mending import Mending
from snapshots.metadata import LayerInfo, Metadata, MetadataFile
from snapshots.recovery import recover
from snapshots.reserve import FULL_DISK, Reserve
from snapshots.syscalls import storage_error, sync_directory
from snapshots.zeroed import zeroed_path

MAINTAIN_BLOCKS = 256  # 1 MiB copied per step: well under the 5 ms a loop turn may take


class Replica(Mending):
    """See the module text."""

    def __init__(self, path: str, file: MetadataFile, metadata: Metadata, lock_fd: int) -> None:
        super().__init__(path, file, metadata, lock_fd)
        self._folder = Folder(self)
        self.hold_folding = False  # set by the daemon while this replica is copied from

    @staticmethod
    def create(
        path: str | os.PathLike[str],
        *,
        size_bytes: int,
        replica_uuid: str,
        volume_uuid: str = "",
        volume_name: str = "",
        head_id: int = 1,
    ) -> None:
        """Make an empty replica in an empty or missing directory, durably."""
        metadata = Metadata(
            replica_uuid=replica_uuid,
            size_bytes=size_bytes,
            volume_uuid=volume_uuid,
            volume_name=volume_name,
            layers=(LayerInfo(id=head_id, slot=1),),
            head_id=head_id,
        )
        directory.create(os.fspath(path), metadata)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Replica:
        """Become the owner of a replica; after a crash, repair its dirty zones."""
        path = os.fspath(path)
        file = MetadataFile(path)
        file.read()  # complains about a directory that is no replica before a lock file is made
        lock_fd = directory.lock(path)
        try:
            metadata = file.read()
            file.reserve = Reserve(path)
            metadata = cls._adopt_pending(path, file) or metadata
            if metadata.head_id == 0:  # stopped in the middle of begin_sync: nothing is here
                empty = LayerInfo(id=1, slot=1)
                metadata = replace(
                    metadata, layers=(empty,), head_id=1, complete=False, hollow=True
                )
                directory.make_files(path, metadata)
                file.write(file.compose(metadata))
            directory.check_layers(path, metadata)
            directory.remove_layers(path, metadata.layers, metadata.head_id)
            if not metadata.complete:
                # Whoever was killed while filling sealed layers knew which ones a flush lacks. What
                # is in the page cache compares as equal, and would not be written again.
                directory.sync_layers(path, metadata.layers)
            replica = cls(path, file, metadata, lock_fd)
            replica.recovered_zones = replica.dirty.dirty_zones()
            if not metadata.clean:
                cls._recover(replica)
            distrust.remove(path)
            replica.zones_recovered()
            replica.commit(replace(metadata, clean=False))
            file.remove_pending()
        except OSError as error:
            os.close(lock_fd)
            raise storage_error("opening replica", path, error) from error
        except BaseException:
            os.close(lock_fd)
            raise
        return replica

    @staticmethod
    def _recover(replica: Replica) -> None:
        try:
            recover(replica)
            if distrust.is_marked(replica.path):
                distrust.rewrite(replica)
        except (OSError, StorageError) as error:
            if error.errno not in FULL_DISK:  # that is before anything was synced
                distrust.mark(replica.path)  # some of it may look durable and not be
            raise

    @staticmethod
    def _adopt_pending(path: str, file: MetadataFile) -> Metadata | None:
        """Go on with the tree of a process killed before its seal was durable, durably now.

        Nothing is removed before that: after a power cut the old head may be the head again.
        """
        metadata = file.read_pending()
        if metadata is None:
            return None
        directory.check_layers(path, metadata)
        directory.sync_layers(path, metadata.layers)
        file.write(file.compose(metadata))
        return metadata

    # Identity and promises

    def promise(self, epoch: int) -> None:
        """Durably refuse epochs below this one from now on."""
        promised = self.metadata.promised_epoch
        if epoch < promised:
            raise ConflictError(
                f"epoch {epoch} is below {promised}, which this replica has promised; "
                "another volume daemon owns the volume"
            )
        if epoch > promised:
            self.commit_changes(promised_epoch=epoch)

    @property
    def config_seq(self) -> int:
        """The newest member configuration this replica has heard of."""
        noted: int = self.dirty.config_seq
        return max(self.metadata.config_seq, noted)

    def store_config(self, config_seq: int, config: dict[str, Any]) -> None:
        """Durably remember the member configuration at the beginning of a session."""
        self.commit_changes(config_seq=config_seq, config=config)

    def note_config(self, config_seq: int) -> None:
        """Durably remember that there is a newer configuration; quick."""
        self.check_open()
        self.dirty.note_config(config_seq)

    def bind(self, volume_uuid: str, volume_name: str) -> None:
        """Durably belong to a volume."""
        self.commit_changes(volume_uuid=volume_uuid, volume_name=volume_name)

    def commit_changes(self, **fields: Any) -> None:
        """Durably change some fields of the metadata."""
        self.settle()
        self.commit(replace(self.metadata, **fields))

    # The layer tree

    def tree(self) -> list[LayerInfo]:
        """All layers, the head among them, with the disk space they use."""
        return [
            replace(layer, allocated_bytes=self._allocated(layer_path(self.path, layer.id)))
            for layer in self.metadata.layers
        ]

    def allocated_bytes(self) -> int:
        """Disk space of all layers, the index and the dirty log."""
        names = [layer_path(self.path, layer.id) for layer in self.metadata.layers]
        names += [self.index.path, self.dirty.path, self.marks.path]
        return sum(map(self._allocated, names))

    @staticmethod
    def _allocated(path: str) -> int:
        """Disk space of a file; one that several directories have counts in each with its part."""
        try:
            found = os.stat(path)
            return found.st_blocks * 512 // max(1, found.st_nlink)
        except FileNotFoundError:
            return 0

    def seal(self, new_head_id: int, name: str, created: str, labels: dict[str, str]) -> None:
        """The head becomes the layer of snapshot `name` ("": not yet one), a new head takes over.

        Immediate; durable after the next flush.
        """
        self.check_open()
        metadata = self.metadata
        chain.check_new_name(metadata.layers, name)
        old = chain.find(metadata.layers, metadata.head_id)
        sealed = replace(old, name=name, created=created, labels=dict(labels))
        layers = chain.replaced(metadata.layers, sealed)
        metadata = chain.with_new_head(replace(metadata, layers=layers), new_head_id, parent=old.id)
        self._create_head_file(new_head_id)
        try:
            head, marks = self._open_head(metadata)
            self.file.write_pending(metadata)
        except StorageError:
            os.unlink(layer_path(self.path, new_head_id))
            raise
        self.changed(self.head)
        self._opened.append(self.head)
        self._condemned.append((zeroed_path(self.head.path), None))
        self._names_changed = self.flushes_begun
        self.adopt(metadata)
        self._adopt_head(head, marks)
        self.layers_changed()

    def _create_head_file(self, layer_id: int) -> None:
        path = layer_path(self.path, layer_id)
        if os.path.exists(path):
            raise ConflictError(f"layer id {layer_id} was in use; layer ids are never used twice")
        create_layer(path, layer_id, self.size_bytes, self.metadata.replica_uuid)

    def name_layer(self, layer_id: int, name: str, created: str, labels: dict[str, str]) -> None:
        """Make a sealed layer a snapshot, or rename it."""
        layer = self._sealed(layer_id)
        chain.check_new_name(self.metadata.layers, name, besides=layer_id)
        named = replace(layer, name=name, created=created, labels=dict(labels))
        self.commit_changes(layers=chain.replaced(self.metadata.layers, named))

    def remove(self, layer_id: int) -> None:
        """Delete a snapshot; `maintain` gives its space back."""
        layer = self._sealed(layer_id)
        removed = replace(layer, removed=True)
        self.commit_changes(layers=chain.replaced(self.metadata.layers, removed))
        self.layers_changed()

    def revert(self, layer_id: int, new_head_id: int) -> None:
        """Make the live content that of a snapshot: a new head on top of it, the old one dropped.

        The layers between stay as a branch of the tree. Durable on return; a crash before the
        switch leaves the old state, after it the new one (the differing zones are dirty by then).
        """
        self.check_open()
        self._sealed(layer_id)
        self.settle()
        metadata = self.metadata
        old = chain.find(metadata.layers, metadata.head_id)
        if new_head_id == old.id:
            raise RequestError(f"new head id {new_head_id} is in use; choose another")
        layers = chain.without(metadata.layers, old.id)
        switched = chain.with_new_head(
            replace(metadata, layers=layers), new_head_id, parent=layer_id
        )
        before = {layer.id for layer in chain.chain(metadata.layers, old.id)}
        after = {layer.id for layer in chain.chain(layers, layer_id)}
        regions: set[int] = set()
        for differing in before ^ after:
            regions.update(self.layer_file(differing).regions())
        self.mark_dirty({region // REGIONS_PER_ZONE for region in regions})
        self._create_head_file(new_head_id)
        path = layer_path(self.path, new_head_id)
        try:
            directory.sync_file(path)
            sync_directory(os.path.dirname(path))
            head, marks = self._open_head(switched)
            self.commit(switched)
        except (OSError, StorageError) as error:
            if not self.failed:
                os.unlink(path)
            if isinstance(error, StorageError):
                raise
            raise storage_error("making the new head durable", path, error) from error
        with self.changing():
            self.condemn(old.id, self.forget_slot(old.slot))
            self.adopt(switched)  # durable already; the next flush removes the old head's file
            self._adopt_head(head, marks)
            self._folder.reset()
            try:
                for region in regions:
                    self.rebuild_index(region)
            except StorageError:
                self.failed = True  # the index is half of the old head and half of the new one
                raise

    def clone(self, layer_id: int, new_head_id: int, target: Target) -> Clone:
        """Share a snapshot's layers with a new replica; its `finish` makes the rest (cloning.py).

        To be called after a flush that began when the snapshot was there.
        """
        self.check_open()
        self.settle()
        clone = Clone(target)
        clone.link(self, layer_id, new_head_id)
        self._folder.reset()  # it has not looked whether files are shared since it began a layer
        return clone

    def _sealed(self, layer_id: int) -> LayerInfo:
        """A layer that is neither the head nor deleted."""
        layer = chain.find(self.metadata.layers, layer_id)
        if layer_id == self.metadata.head_id:
            raise RequestError(f"layer {layer_id} is the head, not a snapshot; name a snapshot")
        if layer.removed:
            raise NotFoundError(f"snapshot {layer.name!r} (layer {layer_id}) is deleted already")
        return layer

    # Background work

    @property
    def flush_wanted(self) -> bool:
        """Background work waits for a flush; a caller with threads runs one as a job."""
        waiting = self._folder.waiting and not self.hold_folding
        return waiting or self._index_wanted or self.metadata_pending

    @property
    def unsharing_bytes(self) -> int:
        """How much a clone that is to be independent has still to copy."""
        return unsharing_bytes(self.path, self.metadata, self._folder.done_of)

    def maintain(self, budget_blocks: int = MAINTAIN_BLOCKS, *, inline_flush: bool = True) -> bool:
        """One bounded step of folding or of clearing the dirty log; True if there is more to do.

        With `inline_flush` it flushes by itself when the work needs it, waiting for the disk.
        Without, it leaves that to the caller: see `flush_wanted`.
        """
        self.check_open()
        if self.failed:
            return False
        fold = self.complete and not self.hold_folding
        with self.changing():
            more = fold and self._folder.step(budget_blocks)
            if self.metadata.unshare and not any(info.removed for info in self.metadata.layers):
                self.adopt(replace(self.metadata, unshare=False))
        if not more and not self.dirty.hot:
            self._index_wanted = bool(self._stable_zones())
        if self.flush_wanted:
            if not inline_flush:
                return True
            self.flush()
        return more or self._index_wanted

    def content_replaced(self) -> None:
        """Whatever was being folded may be different now."""
        self._folder.start_over()
