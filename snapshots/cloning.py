"""A clone: another replica directory that has the sealed layers of a snapshot as hard links.

`Clone.link` runs in the event loop of the replica that is cloned, after a flush: from then on its
layers have two names, and a file with two names is changed by nobody (`LayerFile.shared`): not
folded, not punched, not written by a resync. Putting a good block in place of a damaged one is
allowed: it makes the file what both take it for. `Clone.finish` makes the rest, in any thread: an
empty head on top; the layers below it count as removed, so they are folded into the head when no
other directory has them any more, or at once in a clone that is to be independent (`unshare`). All
zones in which a layer has anything are dirty, so opening it makes their index.

Either directory may be removed at any time. A crash before replica.json is there leaves a directory
that counts as empty; while it is there the layers stay shared. What the clone shows is durable when
`finish` returns.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from protocol.errors import ConflictError, RequestError, StateError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE, REGIONS_PER_ZONE
from snapshots import chain, directory
from snapshots.dirty import DIRTY, header
from snapshots.layer import LayerFile, is_shared, layer_path
from snapshots.logical import Logical
from snapshots.metadata import FILE_NAME, Metadata, MetadataFile
from snapshots.syscalls import storage_error


@dataclass(frozen=True)
class Target:
    """The replica to make, in a directory of the same file system."""

    path: str
    replica_uuid: str
    volume_uuid: str
    volume_name: str
    size_bytes: int
    unshare: bool = False


class Clone:
    """One clone in the making."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock_fd = -1
        self._metadata: Metadata | None = None

    def link(self, store: Logical, layer_id: int, new_head_id: int) -> None:
        """Give the directory the layers of a snapshot. All of them are durable in `store`.

        `new_head_id` is above the ids of all layers that the snapshot shows. A directory that holds
        the wanted replica is left as it is: the content of a snapshot does not change. Links can
        be made within one file system only.
        """
        target = self._target
        if not store.complete:
            raise StateError(f"replica {store.path} is incomplete and cannot be cloned")
        info = chain.find(store.metadata.layers, layer_id)
        if info.removed or not info.name:
            raise RequestError(f"layer {layer_id} is no snapshot; name a snapshot")
        if store.size_bytes < target.size_bytes:
            raise RequestError(
                f"a clone of {target.size_bytes} bytes cannot be larger than the replica it comes "
                f"from, which has {store.size_bytes}; grow it afterwards"
            )
        try:
            if self._is_there():
                return
            self._lock_fd = directory.lock_empty(target.path)
            self._metadata = self._link(store, layer_id, new_head_id)
        except OSError as error:
            self.abandon()
            raise self._cannot_link(store, error) from error
        except BaseException:
            self.abandon()
            raise

    def _is_there(self) -> bool:
        target = self._target
        if not os.path.exists(os.path.join(target.path, FILE_NAME)):
            return False
        found = MetadataFile(target.path).read()
        if (found.replica_uuid, found.volume_uuid) != (target.replica_uuid, target.volume_uuid):
            raise ConflictError(
                f"{target.path} is replica {found.replica_uuid} already; remove it first or choose "
                "another path"
            )
        return True

    def _link(self, store: Logical, layer_id: int, new_head_id: int) -> Metadata:
        target, own = self._target, store.metadata.replica_uuid
        infos = chain.chain(store.metadata.layers, layer_id)
        os.makedirs(os.path.join(target.path, "layers"), exist_ok=True)
        directory.remove_layers(target.path, ())
        for info in infos:
            os.link(layer_path(store.path, info.id), layer_path(target.path, info.id))
        layers = tuple(
            replace(info, name="", labels={}, removed=True, origin=info.origin or own)
            for info in infos
        )
        metadata = Metadata(
            replica_uuid=target.replica_uuid,
            volume_uuid=target.volume_uuid,
            volume_name=target.volume_name,
            size_bytes=store.size_bytes,
            layers=layers,
            clean=False,
            unshare=target.unshare,
        )
        return chain.with_new_head(metadata, new_head_id, parent=layer_id)

    def _cannot_link(self, store: Logical, error: OSError) -> StorageError:
        """Say what to do about it."""
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            return StorageError(
                f"the layers of {store.path} cannot be linked into {self._target.path}: "
                f"{os.strerror(error.errno)}; a clone needs a directory of the same file system, "
                "one that has hard links",
                errno=error.errno,
            )
        return storage_error("linking layers into", self._target.path, error)

    def finish(self) -> None:
        """Make the rest, durably; any thread."""
        if self._metadata is None:
            return
        try:
            path, metadata = self._target.path, self._metadata
            directory.complete(path, metadata, _dirty_log(path, metadata))
        except OSError as error:
            raise storage_error("making clone", self._target.path, error) from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give the directory free; what is in it counts as nothing if it was not finished."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def unsharing_bytes(
    path: str, metadata: Metadata, done_of: Callable[[int], float] = lambda layer_id: 0.0
) -> int:
    """How much a clone that is to be independent has still to copy.

    `done_of` tells which part of a layer it has already.
    """
    if not metadata.unshare:
        return 0
    left = 0.0
    for info in metadata.layers:
        name = layer_path(path, info.id)
        if info.removed and os.path.exists(name) and is_shared(name):
            left += os.stat(name).st_blocks * 512 * (1 - done_of(info.id))
    return int(left)


def _dirty_log(path: str, metadata: Metadata) -> bytes:
    """The content of a dirty log in which all zones are dirty where a layer has anything."""
    block_count = metadata.size_bytes // BLOCK_BYTES
    zones = array("Q", bytes(8 * -(-block_count // BLOCKS_PER_ZONE)))
    for info in metadata.layers:
        if info.id == metadata.head_id:
            continue
        layer = LayerFile(layer_path(path, info.id), info.slot, metadata.size_bytes)
        region = layer.next_allocated(0)
        while region < layer.region_count:
            zones[region // REGIONS_PER_ZONE] = DIRTY
            region = layer.next_allocated((region // REGIONS_PER_ZONE + 1) * REGIONS_PER_ZONE)
    return header(metadata.config_seq) + zones.tobytes()
