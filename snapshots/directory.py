"""The directory of a replica: making it, locking it, sweeping what a crash left over.

replica.json   metadata.py      layers/<id>.layer    layer.py
index          index.py         layers/<id>.zeroed   zeroed.py, only next to the head
dirty.log      dirty.py         lock                 held with flock(2) by the owner, has its pid
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from protocol.errors import ConflictError, RequestError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE, check_size
from snapshots.dirty import dirty_bytes
from snapshots.index import index_bytes
from snapshots.layer import check_layer, create_layer, layer_path
from snapshots.metadata import FILE_NAME, LayerInfo, Metadata, MetadataFile
from snapshots.reserve import Reserve
from snapshots.syscalls import storage_error, sync_directory, write_all
from snapshots.zeroed import zeroed_path


def create(path: str, metadata: Metadata) -> None:
    """Make a new replica directory with empty layers, durably."""
    check_size(metadata.size_bytes)
    try:
        os.makedirs(path, exist_ok=True)
        found = os.listdir(path)
    except OSError as error:
        raise storage_error("creating replica directory", path, error) from error
    if FILE_NAME in found:
        raise ConflictError(f"{path} is a replica already; remove it first or choose another path")
    if found and found != ["lost+found"]:
        raise RequestError(f"{path} is not empty (it has {found[0]!r}); choose an empty directory")
    try:
        make_files(path, metadata)
        file = MetadataFile(path)
        file.reserve = Reserve(path)
        if not file.reserve.refill():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(file.compose(metadata))
        sync_directory(os.path.dirname(os.path.abspath(path)))
    except (OSError, StorageError) as error:
        remove_layers(path, ())
        for name in ("index", "dirty.log", "reserve", FILE_NAME + ".tmp", FILE_NAME):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, name))
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(path, "layers"))
        if isinstance(error, StorageError):
            raise
        raise storage_error("creating replica", path, error) from error


def make_files(path: str, metadata: Metadata) -> None:
    """Replace index, dirty log and all layers by empty ones, durably (not replica.json)."""
    os.makedirs(os.path.join(path, "layers"), exist_ok=True)
    remove_layers(path, ())
    block_count = metadata.size_bytes // BLOCK_BYTES
    zone_count = -(-block_count // BLOCKS_PER_ZONE)
    _make_file(os.path.join(path, "index"), index_bytes(block_count), filled=False)
    # Filled, so that setting a bit can never run out of space.
    _make_file(os.path.join(path, "dirty.log"), dirty_bytes(zone_count), filled=True)
    for layer in metadata.layers:
        name = layer_path(path, layer.id)
        create_layer(name, layer.id, metadata.size_bytes, metadata.replica_uuid)
        sync_file(name)
    sync_directory(os.path.join(path, "layers"))
    sync_directory(path)


def _make_file(path: str, length: int, *, filled: bool) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        if filled:
            write_all(fd, bytes(length), 0)
        os.ftruncate(fd, length)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: str) -> None:
    """Make a file durable."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: str) -> int:
    """Become the only owner; returns the descriptor that holds the lock."""
    try:
        fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise storage_error("locking replica", path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ConflictError(
            f"replica {path} is in use by process {holder}; stop that process first"
        ) from error
    with contextlib.suppress(OSError):  # the pid only helps whoever finds the lock taken
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def check_layers(path: str, metadata: Metadata) -> None:
    """Refuse a directory whose layer files are not those of the tree."""
    for layer in metadata.layers:
        check_layer(
            layer_path(path, layer.id), layer.id, metadata.size_bytes, metadata.replica_uuid
        )


def remove_layers(path: str, keep: tuple[LayerInfo, ...], head_id: int = 0) -> None:
    """Remove files of layers that are not in the tree, and marks of all but the head."""
    wanted = {layer_path(path, layer.id) for layer in keep}
    wanted.add(zeroed_path(layer_path(path, head_id)))
    directory = os.path.join(path, "layers")
    with contextlib.suppress(OSError):  # left over files cost space, nothing else
        for name in os.listdir(directory):
            full = os.path.join(directory, name)
            if full not in wanted and name.endswith((".layer", ".zeroed")):
                os.unlink(full)
