"""The directory of a replica: making it, locking it, sweeping what a crash left over.

replica.json   metadata.py      layers/<id>.layer    layer.py
index          index.py         layers/<id>.zeroed   zeroed.py, only next to the head
dirty.log      dirty.py         lock                 held with flock(2) by the owner, has its pid
reserve        reserve.py       replica.pending.json metadata.py, between a seal and its flush
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from protocol.errors import ConflictError, RequestError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE, check_size
from snapshots import distrust
from snapshots.dirty import dirty_bytes, header
from snapshots.index import index_bytes
from snapshots.layer import check_layer, create_layer, file_bytes, layer_path
from snapshots.metadata import FILE_NAME, PENDING_NAME, LayerInfo, Metadata, MetadataFile
from snapshots.reserve import Reserve
from snapshots.syscalls import storage_error, sync_directory, write_all
from snapshots.zeroed import zeroed_path

_OWN_NAMES = {"index", "dirty.log", "reserve", "lock", PENDING_NAME, PENDING_NAME + ".tmp"}
_OWN_NAMES |= {FILE_NAME, FILE_NAME + ".tmp", distrust.FILE_NAME}


def create(path: str, metadata: Metadata) -> None:
    """Make a new replica directory with empty layers, durably.

    A directory that holds only what an interrupted create left over counts as empty.
    """
    check_size(metadata.size_bytes)
    lock_fd = lock_empty(path)
    try:
        complete(path, metadata)
    except OSError as error:
        raise storage_error("creating replica", path, error) from error
    finally:
        os.close(lock_fd)


def lock_empty(path: str) -> int:
    """Become the owner of a directory that is to become a replica; the descriptor of the lock."""
    try:
        os.makedirs(path, exist_ok=True)
        _check_empty(path)
    except OSError as error:
        raise storage_error("creating replica directory", path, error) from error
    lock_fd = lock(path)
    try:
        _check_empty(path)  # nobody else is creating one here from now on
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def complete(path: str, metadata: Metadata, dirty_log: bytes = b"") -> None:
    """Make all files of a locked, empty directory, durably, replica.json last; see `make_files`."""
    try:
        make_files(path, metadata, dirty_log)
        file = MetadataFile(path)
        file.reserve = Reserve(path)
        if not file.reserve.refill():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(file.compose(metadata))
        sync_directory(os.path.dirname(os.path.abspath(path)))
    except (OSError, StorageError):
        remove_layers(path, ())
        for name in _OWN_NAMES:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, name))
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(path, "layers"))
        raise


def _check_empty(path: str) -> None:
    """Refuse a replica, and a directory with anything that is not ours."""
    found = os.listdir(path)
    if FILE_NAME in found:
        raise ConflictError(f"{path} is a replica already; remove it first or choose another path")
    foreign = [name for name in found if name not in _OWN_NAMES | {"layers", "lost+found"}]
    if "layers" in found:
        layers = os.listdir(os.path.join(path, "layers"))
        foreign += [f"layers/{name}" for name in layers if not name.endswith((".layer", ".zeroed"))]
    if foreign:
        raise RequestError(
            f"{path} is not empty (it has {foreign[0]!r}); choose an empty directory"
        )


def make_files(path: str, metadata: Metadata, dirty_log: bytes = b"") -> None:
    """Replace index, dirty log and layers by empty ones, durably (not replica.json).

    Layers of another origin are there and stay. `dirty_log` is the content of that file if it is
    not to be empty.
    """
    os.makedirs(os.path.join(path, "layers"), exist_ok=True)
    linked = tuple(layer for layer in metadata.layers if layer.origin)
    remove_layers(path, linked)
    block_count = metadata.size_bytes // BLOCK_BYTES
    zone_count = -(-block_count // BLOCKS_PER_ZONE)
    _make_file(os.path.join(path, "index"), index_bytes(block_count), b"")
    # Filled, so that setting a bit can never run out of space.
    log = (dirty_log or header(metadata.config_seq)).ljust(dirty_bytes(zone_count), b"\0")
    _make_file(os.path.join(path, "dirty.log"), len(log), log)
    for layer in metadata.layers:
        if layer in linked:
            continue
        name = layer_path(path, layer.id)
        create_layer(name, layer.id, metadata.size_bytes, metadata.replica_uuid)
        sync_file(name)
    sync_directory(os.path.join(path, "layers"))
    sync_directory(path)


def extend_files(path: str, metadata: Metadata) -> None:
    """Make all files long enough for the size in `metadata`, durably (not replica.json).

    What is new in them reads as zeros. Stopped half way, or if replica.json is never written, the
    files are longer than they need be, which does no harm.
    """
    block_count = metadata.size_bytes // BLOCK_BYTES
    zone_count = -(-block_count // BLOCKS_PER_ZONE)
    for layer in metadata.layers:
        _extend_file(layer_path(path, layer.id), file_bytes(metadata.size_bytes))
    _extend_file(os.path.join(path, "index"), index_bytes(block_count))
    # Filled, so that setting a bit can never run out of space.
    _extend_file(os.path.join(path, "dirty.log"), dirty_bytes(zone_count), filled=True)


def _extend_file(path: str, length: int, *, filled: bool = False) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # a clone may have this file, too, and grow at this moment
        there = os.fstat(fd).st_size
        if there < length:
            if filled:
                write_all(fd, bytes(length - there), there)
            else:
                os.ftruncate(fd, length)
            os.fsync(fd)
    finally:
        os.close(fd)


def _make_file(path: str, length: int, content: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # a thread may have the old one mapped
        os.unlink(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_all(fd, content, 0)
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


def sync_layers(path: str, layers: tuple[LayerInfo, ...]) -> None:
    """Make the files of all layers durable, and their names."""
    for layer in layers:
        sync_file(layer_path(path, layer.id))
    sync_directory(os.path.join(path, "layers"))


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
    if os.fstat(fd).st_nlink == 0:
        os.close(fd)
        raise ConflictError(f"{path} is just being removed; look what is there and try again")
    try:  # the pid only helps whoever finds the lock taken
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        pass
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_layers(path: str, metadata: Metadata) -> None:
    """Refuse a directory whose layer files are not those of the tree."""
    for layer in metadata.layers:
        origin = layer.origin or metadata.replica_uuid
        check_layer(layer_path(path, layer.id), layer.id, metadata.size_bytes, origin)


def layer_files(path: str, layers: tuple[LayerInfo, ...], head_id: int) -> set[str]:
    """The files of some layers, and the marks of the head."""
    wanted = {layer_path(path, layer.id) for layer in layers}
    return wanted | {zeroed_path(layer_path(path, head_id))}


def remove_layers(path: str, keep: tuple[LayerInfo, ...], head_id: int = 0) -> None:
    """Remove files of layers that are not in the tree, and marks of all but the head."""
    wanted = layer_files(path, keep, head_id)
    directory = os.path.join(path, "layers")
    with contextlib.suppress(OSError):  # left over files cost space, nothing else
        for name in os.listdir(directory):
            full = os.path.join(directory, name)
            if full not in wanted and name.endswith((".layer", ".zeroed")):
                os.unlink(full)
