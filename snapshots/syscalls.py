"""The file operations Python does not offer, and the errors of all others in one shape.

`allocate` makes sure that later stores into a memory-mapped range cannot run out of space (a full
disk is an ENOSPC here, never a SIGBUS there). `map_shared` maps a file. `punch` gives space back.
`begin_writing_back` lets the disk begin. Sources: fallocate(2), sync_file_range(2), munlock(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES

FALLOC_FL_KEEP_SIZE = 1  # include/uapi/linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 2
SYNC_FILE_RANGE_WRITE = 2  # include/uapi/linux/fs.h
TMPFS_MAGIC = 0x01021994  # include/uapi/linux/magic.h
_FILL_BYTES = 1 << 20  # where punching is not possible, zeros are written in pieces of this

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_sync_file_range = ctypes.CDLL(None).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_munlock = ctypes.CDLL(None).munlock
_munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_fstatfs.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), repeated when a signal interrupts it; raises OSError."""
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def touching_allocates(fd: int) -> bool:
    """Does reading a hole through a mapping take space, or raise SIGBUS without? (tmpfs)"""
    answer = (ctypes.c_long * 64)()  # a struct statfs has 120 bytes and begins with the type
    return _fstatfs(fd, answer) == 0 and answer[0] == TMPFS_MAGIC


def map_shared(fd: int, length: int) -> mmap.mmap:
    """A file in memory, as evictable page cache even where the process locks its memory."""
    memory = mmap.mmap(fd, length)
    _munlock(ctypes.addressof(ctypes.c_char.from_buffer(memory)), length)
    return memory


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve disk space for a range of whole blocks and leave its content as it is."""
    try:
        fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        for start in range(offset, offset + length, BLOCK_BYTES):  # no fallocate: write it back
            write_all(fd, os.pread(fd, BLOCK_BYTES, start).ljust(BLOCK_BYTES, b"\0"), start)


def punch(fd: int, offset: int, length: int) -> None:
    """Give the space of a range back; it reads as zeros afterwards.

    Without file system support it is overwritten and stays used: recovery relies on the zeros.
    """
    try:
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        for start in range(offset, offset + length, _FILL_BYTES):
            write_all(fd, bytes(min(_FILL_BYTES, offset + length - start)), start)


def begin_writing_back(fd: int, offset: int, length: int) -> None:
    """Let the disk begin with what is in the page cache only. Says nothing about durability."""
    _sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE)


def write_all(fd: int, data: memoryview | bytes | bytearray, offset: int) -> None:
    """pwrite(2) until everything is written (a nearly full disk makes short writes)."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], offset + written)


def sync_directory(path: str) -> None:
    """Make created, renamed and removed names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def storage_error(action: str, path: str, error: OSError) -> StorageError:
    """The StorageError for a failed system call; a full disk says what helps."""
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "; free space on this disk, delete snapshots or trim the volume"
    return StorageError(f"{action} {path}: {error.strerror}{hint}", errno=error.errno)


def nowait_flag(directory: str) -> int:
    """RWF_NOWAIT, or 0 where the file system does not know it (tmpfs: its reads never wait)."""
    fd = os.open(os.path.join(directory, "replica.json"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return 0
        raise
    finally:
        os.close(fd)
    return os.RWF_NOWAIT
