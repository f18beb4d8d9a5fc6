"""One layer on disk: a sparse file of blocks with their checksums.

Byte layout (all little-endian, block = 4096 bytes, region = 1024 blocks):

    0                      header, one block: magic, version, layer id, size of the volume when the
                           layer was made, owner, CRC32C
    4096 + r * 1025 * 4096 map block of region r: 1024 u32, one per block
    ... + 4096             the 4 MiB of data of region r

so block b lies at file block b + (b >> 10) + 2, and its map entry is u32 number
b + ((b >> 10) << 20) + 1024 of the file. Map and data of a region are neighbours in one file: one
fdatasync makes both durable and a region is copied from one place.

A map entry is 0 = absent (look in the parent), 3 = zeros, else the CRC32C of the block. The whole
file is memory-mapped and shared; only map blocks are touched through the mapping, data goes through
pread and pwrite. A mapped page that is not allocated must never be stored to (SIGBUS on a full
disk) and one that is not in the page cache should not be touched in the event loop, therefore
`ready` knows for each region: UNKNOWN < WARM (map block has been read once, so it is cached and
readable) < WRITABLE (its space is allocated as well).

Threads: the file descriptor and the mapping live exactly as long as the object. Whoever holds a
reference can go on reading while the event loop forgets the layer, evicts or unlinks it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Sequence

from protocol.checksum import blake2b, crc32c
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES
from snapshots.masks import EMPTY_MAP
from snapshots.syscalls import (
    allocate,
    begin_writing_back,
    map_shared,
    punch,
    storage_error,
    write_all,
)

assert sys.byteorder == "little", "maps are used as they lie in the file"

FORMAT_VERSION = 2
REGION_STRIDE_BYTES = BLOCK_BYTES + REGION_BYTES
UNKNOWN, WARM, WRITABLE = 0, 1, 2

_MAGIC = b"blockdLY"
_HEADER = struct.Struct("<8sIIQ16sI")  # magic, version, layer id, size, owner, CRC of what precedes
_scratch = bytearray(BLOCK_BYTES)  # what warming reads lands here and is never looked at


def file_bytes(size_bytes: int) -> int:
    """Length of a layer file; whole regions, so that every map block has its page."""
    return BLOCK_BYTES + -(-size_bytes // REGION_BYTES) * REGION_STRIDE_BYTES


def block_offset(block: int) -> int:
    """Byte offset of a block's data."""
    return (block + (block >> 10) + 2) << 12


def entry_number(block: int) -> int:
    """Number of a block's map entry, counted in u32 from the start of the file."""
    return block + ((block >> 10) << 20) + 1024


def map_offset(region: int) -> int:
    """Byte offset of a region's map block."""
    return BLOCK_BYTES + region * REGION_STRIDE_BYTES


def layer_path(directory: str, layer_id: int) -> str:
    """The file of a layer of the replica in `directory`."""
    return os.path.join(directory, "layers", f"{layer_id}.layer")


def _header(layer_id: int, size_bytes: int, replica_uuid: str) -> bytes:
    owner = blake2b(replica_uuid.encode(), digest_size=16).digest()
    packed = _HEADER.pack(_MAGIC, FORMAT_VERSION, layer_id, size_bytes, owner, 0)[:-4]
    return (packed + struct.pack("<I", crc32c(packed))).ljust(BLOCK_BYTES, b"\0")


def create_layer(path: str, layer_id: int, size_bytes: int, replica_uuid: str) -> None:
    """Make an empty layer file; nothing of it is durable yet. Leaves no file behind on failure.

    A left over file goes first, and is not emptied: another directory may have it, too.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_all(fd, _header(layer_id, size_bytes, replica_uuid), 0)
            os.ftruncate(fd, file_bytes(size_bytes))
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise storage_error("creating layer", path, error) from error


def check_layer(path: str, layer_id: int, size_bytes: int, origin: str) -> None:
    """Refuse a layer file that is missing, too short or not made by the replica `origin`.

    It may be longer than `size_bytes` needs: growing stopped half way.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            header = file.read(BLOCK_BYTES)
            length = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise StorageError(
            f"layer file {path} is missing; restore it or rebuild this replica from another"
        ) from error
    except OSError as error:
        raise storage_error("opening layer", path, error) from error
    if length < file_bytes(size_bytes) or (length - BLOCK_BYTES) % REGION_STRIDE_BYTES:
        raise StorageError(
            f"layer file {path} is {length} bytes long, expected {file_bytes(size_bytes)}; "
            "rebuild this replica from another"
        )
    made_bytes = _HEADER.unpack_from(header)[3]
    if header != _header(layer_id, made_bytes, origin) or made_bytes > size_bytes:
        raise StorageError(
            f"layer file {path} has a damaged header or belongs to another replica or layer "
            f"(expected layer {layer_id}, format {FORMAT_VERSION}); rebuild this replica"
        )


def next_region(layers: Iterable[LayerFile], region: int) -> int:
    """The first region from `region` on in which one of some layers has an entry, or -1."""
    found = [layer.next_region(region) for layer in layers]
    return min((number for number in found if number >= 0), default=-1)


def look_ahead(layers: Sequence[LayerFile], nexts: list[int], region: int) -> None:
    """Keep in `nexts` the first region from `region` on of each layer; beyond the end: none.

    For a walk upwards: only layers whose last answer lies behind are asked again. Begin with -1.
    """
    for number, layer in enumerate(layers):
        if nexts[number] < region:
            following = layer.next_region(region)
            nexts[number] = following if following >= 0 else layer.region_count


class LayerFile:
    """An open layer. See the module text for who may touch what."""

    __slots__ = ("fd", "map", "mapped_bytes", "memory", "path", "ready", "region_count", "slot")

    def __init__(self, path: str, slot: int, size_bytes: int) -> None:
        self.path = path
        self.slot = slot
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDWR)
            self.mapped_bytes = file_bytes(size_bytes)
            self.memory = map_shared(self.fd, self.mapped_bytes)
            self.memory.madvise(mmap.MADV_RANDOM)  # a fault must not read data blocks ahead
        except OSError as error:
            raise storage_error("opening layer", path, error) from error
        except ValueError as error:
            raise StorageError(f"layer file {path} is too short; rebuild this replica") from error
        self.map = memoryview(self.memory).cast("I")
        self.region_count = -(-size_bytes // REGION_BYTES)
        self.ready = bytearray(self.region_count)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def warm(self, region: int, flags: int = 0) -> bool:
        """Bring a region's map block into the page cache; False: it would block (RWF_NOWAIT)."""
        try:
            got = os.preadv(self.fd, [_scratch], map_offset(region), flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise storage_error("reading the map of", self.path, error) from error
        if got != BLOCK_BYTES:
            return False
        if self.ready[region] == UNKNOWN:
            self.ready[region] = WARM
        return True

    def make_writable(self, region: int) -> None:
        """Allocate a region's map block so that entries can be stored."""
        if self.ready[region] == WRITABLE:
            return
        try:
            allocate(self.fd, map_offset(region), BLOCK_BYTES)
        except OSError as error:
            raise storage_error("allocating the map of", self.path, error) from error
        self.warm(region)
        self.ready[region] = WRITABLE

    def map_block(self, region: int) -> bytes:
        """A copy of a region's 1024 map entries."""
        start = map_offset(region)
        if self.ready[region] == WRITABLE:
            return self.memory[start : start + BLOCK_BYTES]
        try:  # perhaps a hole: reading one through the mapping takes space on tmpfs, or is a SIGBUS
            block = os.pread(self.fd, BLOCK_BYTES, start)
        except OSError as error:
            raise storage_error("reading the map of", self.path, error) from error
        if len(block) != BLOCK_BYTES:
            raise StorageError(f"layer {self.path} ends early at byte {start + len(block)}")
        if self.ready[region] == UNKNOWN:
            self.ready[region] = WARM
        return block

    def next_region(self, region: int) -> int:
        """The first region from `region` on whose map has an entry, or -1."""
        while region < self.region_count:
            region = self.next_allocated(region)
            if region < self.region_count and self.map_block(region) != EMPTY_MAP:
                return region
            region += 1
        return -1

    def next_allocated(self, region: int) -> int:
        """The first region from `region` on whose map block may be anything but a hole.

        Regions this process has stored to count always: what lseek(2) says about stores that are
        still in the page cache need not be relied on.
        """
        stored = self.ready.find(WRITABLE, region)
        if stored < 0:
            stored = self.region_count
        try:
            offset = os.lseek(self.fd, map_offset(region), os.SEEK_DATA) - BLOCK_BYTES
        except OSError:  # ENXIO: only a hole is left
            return stored
        found, within = divmod(offset, REGION_STRIDE_BYTES)
        return min(stored, found + (within >= BLOCK_BYTES))

    def is_allocated(self, region: int) -> bool:
        """May anything of a region, map or data, be more than a hole? For regions not stored to."""
        start = map_offset(region)
        try:
            return os.lseek(self.fd, start, os.SEEK_DATA) < start + REGION_STRIDE_BYTES
        except OSError:  # ENXIO: only a hole is left
            return False

    def regions(self) -> list[int]:
        """All regions whose map has at least one entry."""
        found = []
        region = self.next_region(0)
        while region >= 0:
            found.append(region)
            region = self.next_region(region + 1)
        return found

    def read(self, block: int, count: int, target: memoryview) -> None:
        """Read the data of blocks of one region, waiting for the disk."""
        length, offset, done = count * BLOCK_BYTES, block_offset(block), 0
        try:
            while done < length:
                got = os.preadv(self.fd, [target[done:length]], offset + done)
                if not got:
                    raise StorageError(f"layer {self.path} ends early at byte {offset + done}")
                done += got
        except OSError as error:
            raise storage_error("reading layer", self.path, error) from error

    def forget_cached(self, block: int, count: int) -> None:
        """Take blocks out of the page cache that are on the disk as they are there."""
        os.posix_fadvise(self.fd, block_offset(block), count * BLOCK_BYTES, os.POSIX_FADV_DONTNEED)

    def begin_writing_back(self, region: int) -> None:
        """Let the disk begin with what was written to a region. Any thread; promises nothing."""
        begin_writing_back(self.fd, map_offset(region), REGION_STRIDE_BYTES)

    def write(self, block: int, data: memoryview) -> None:
        """Write the data of blocks of one region; no map entry changes."""
        try:
            write_all(self.fd, data, block_offset(block))
        except OSError as error:
            raise storage_error("writing layer", self.path, error) from error

    def punch(self, block: int, count: int) -> None:
        """Give the data space of blocks of one region back; no map entry changes."""
        try:
            punch(self.fd, block_offset(block), count * BLOCK_BYTES)
        except OSError as error:
            raise storage_error("punching layer", self.path, error) from error

    def store(self, block: int, entries: memoryview) -> None:
        """Store map entries for blocks of one region, which is WRITABLE."""
        region = block >> 10
        assert self.ready[region] == WRITABLE, (self.path, region)
        assert (block & (BLOCKS_PER_REGION - 1)) + len(entries) <= BLOCKS_PER_REGION
        number = entry_number(block)
        self.map[number : number + len(entries)] = entries

    @property
    def shared(self) -> bool:
        """Does another directory have this file, too? Then nothing in it may change."""
        return is_shared(self.fd)

    def allocated_bytes(self) -> int:
        """Disk space in use."""
        return os.fstat(self.fd).st_blocks * 512


def is_shared(file: int | str) -> bool:
    """Does a layer file, by descriptor or path, have more than one name?"""
    try:
        return os.stat(file).st_nlink > 1
    except OSError as error:
        raise storage_error("looking at layer", str(file), error) from error
