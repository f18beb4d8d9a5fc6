"""The wire between a volume daemon and a replica daemon: bytes to frames and back.

A frame is a 40-byte little-endian header and a payload:

    offset  size  field
    0       4     magic "bkd1"
    4       1     version (1)
    5       1     operation
    6       2     flags
    8       4     length     bytes of the volume the operation is about, or the payload's CRC32C
    12      8     offset     byte offset in the volume; a place (`place`) in LAYER_*, MEND, CHANGED
    20      8     sequence   order of the operation; a reply repeats it
    28      4     argument   layer id in requests, errno in REFUSED, how many reads DATA answers
    32      4     payload    bytes that follow the header
    36      4     CRC32C of bytes 0..35

The payload size stands apart from `length` so that a reader frames a message without knowing its
operation. Blocks travel as one little-endian u32 map entry per 4 KiB block (protocol.checksum),
then the data; except in WRITE only blocks that have data (entry > 3) follow, densely. Control
payloads are JSON objects. What no map entry protects is covered by a CRC32C in `length`: the whole
payload of READ, EXTENT_LIST, LAYER_DIGESTS and control messages, the map entries of LAYER_DATA,
LAYER_WRITE and MEND. LAYER_* are about blocks of one region of a logical layer (a layer and what is
being folded into it, protocol/trees.py); with a `length` other than 0, LAYER_HASH is about what
is on the disk, not in memory.

READ asks for several ranges of blocks at once, numbered from `sequence` on: what a client sent in
one batch. Its payload is the first block of each, then the block count of each, as u32. DATA
answers `argument` ranges from its `sequence` on: the map entries of all, then for each range
HEADROOM_BYTES of room and its data. In the room the volume daemon puts the header of its own reply,
so that data goes on without being copied or cut into pieces. The ranges of a READ may be answered
by several DATA and REFUSED, in any order.

The order of a session: HELLO and its answer, PROVE, FENCE, then everything else. A link is
first in, first out, and the replica applies operations in that order; that order is the total
order of the volume. APPLIED answers every WRITE and ZERO up to its sequence that was not REFUSED
before. FULL says that the change of its sequence and later ones wait for disk space (`argument`:
errno); until an APPLIED ends that, DONE answers single ZERO that did not wait. The `argument` of
WRITE and ZERO says how many sequences back all members have applied everything. CHANGED asks in
which blocks a layer (`argument`) may differ from the one in its place. FLUSH, EXTENTS, CHANGED,
CONTROL, LAYER_*, MEND and PING are answered one by one. STABLE has no answer: the FLUSH whose
sequence is its `offset` has succeeded on every member of configuration `argument`.

Invariants: payload <= PAYLOAD_BYTES_MAX; a frame with a wrong magic, version, CRC or size ends the
session. No socket, file or clock here.
"""

from __future__ import annotations

import json
import struct
import sys
from _operator import _compare_digest
from array import array
from collections.abc import Sequence
from typing import Any

from protocol.checksum import blake2b, block_checksum, block_checksums, crc32c
from protocol.errors import BlockdError, PeerError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES

assert sys.byteorder == "little", "u32 arrays go on the wire as they lie in memory"

MAGIC = 0x31646B62  # "bkd1" in little-endian
VERSION = 1
HEADER_BYTES = 40
PAYLOAD_BYTES_MAX = REGION_BYTES + 4 * BLOCKS_PER_REGION  # one whole region with its map
NONCE_BYTES = 32

# Requests, volume daemon to replica.
HELLO, PROVE, FENCE = 1, 2, 3
READ, WRITE, ZERO, FLUSH, EXTENTS, STABLE = 16, 17, 18, 19, 20, 21
PING, CHANGED = 22, 23
CONTROL, LAYER_READ, LAYER_WRITE, LAYER_HASH, MEND = 32, 33, 34, 35, 36
# Answers, replica to volume daemon.
APPLIED, DATA, FLUSHED, EXTENT_LIST = 128, 129, 130, 131
ANSWER, LAYER_DATA, REFUSED = 132, 133, 134
BUSY = 135  # answers nothing: a flush is running and the replica lives
LAYER_DIGESTS = 136
PONG, FULL, DONE = 137, 138, 139

ANSWERS = {  # of the requests that are answered one by one
    FLUSH: FLUSHED,
    EXTENTS: EXTENT_LIST,
    CHANGED: EXTENT_LIST,
    CONTROL: ANSWER,
    LAYER_READ: LAYER_DATA,
    LAYER_WRITE: ANSWER,
    LAYER_HASH: LAYER_DIGESTS,
    MEND: ANSWER,
    PING: PONG,
}

HEADROOM_BYTES = 28  # before the data of each range in DATA: the largest header of an NBD reply
CELL_BYTES = HEADROOM_BYTES + BLOCK_BYTES  # one block and the room before it
READS_MAX = 1024  # ranges of one READ: more than any client has under way on one connection

KEEP_ALLOCATED = 1  # flag of ZERO: the range must stay allocated (NBD NO_HOLE)

Frame = tuple[int, int, int, int, int, int, memoryview | None]
"""operation, flags, length, offset, sequence, argument, payload"""

_HEADER = struct.Struct("<IBBHIQQII")
_HEADER_CRC = struct.Struct("<IBBHIQQIII")
_U32 = struct.Struct("<I")
_TWO_U32 = struct.Struct("<II")
_pack = _HEADER.pack
_unpack = _HEADER_CRC.unpack_from
_ONE_BLOCK_PAYLOAD = BLOCK_BYTES + 4

# How many bytes of a payload the CRC in `length` covers, by operation.
_MAP = -1  # the map entries, 4 bytes for each of the `flags` blocks
_COVERED = [0] * 256
for _operation in (HELLO, PROVE, FENCE, READ, CONTROL, EXTENT_LIST, ANSWER, REFUSED, LAYER_DIGESTS):
    _COVERED[_operation] = PAYLOAD_BYTES_MAX
for _operation in (LAYER_DATA, LAYER_WRITE, MEND):
    _COVERED[_operation] = _MAP


class WireError(PeerError):
    """The bytes are not the protocol; the session ends."""

    code = "wire"


def frame(
    operation: int,
    sequence: int,
    *,
    length: int = 0,
    offset: int = 0,
    argument: int = 0,
    flags: int = 0,
    payload_bytes: int = 0,
) -> bytes:
    """The 40 header bytes of one frame."""
    header = _pack(
        MAGIC, VERSION, operation, flags, length, offset, sequence, argument, payload_bytes
    )
    return header + _U32.pack(crc32c(header))


def pack_into(
    buffer: bytearray | memoryview,
    position: int,
    operation: int,
    sequence: int,
    *,
    length: int = 0,
    offset: int = 0,
    argument: int = 0,
    payload_bytes: int = 0,
) -> None:
    """Write the header of an answer into `buffer` at `position`."""
    header = _pack(MAGIC, VERSION, operation, 0, length, offset, sequence, argument, payload_bytes)
    buffer[position : position + 36] = header
    _U32.pack_into(buffer, position + 36, crc32c(header))


def write_header(sequence: int, offset: int, data: memoryview, behind: int = 0) -> bytes:
    """Header and map entries of a WRITE; the data follows in a buffer of its own.

    All members have applied everything up to `sequence - behind`.
    """
    length = len(data)
    if length == BLOCK_BYTES:
        size = _ONE_BLOCK_PAYLOAD
        header = _pack(MAGIC, VERSION, WRITE, 0, length, offset, sequence, behind, size)
        return header + _TWO_U32.pack(crc32c(header), block_checksum(data))
    entries = block_checksums(data)
    size = length + 4 * len(entries)
    head = frame(WRITE, sequence, length=length, offset=offset, argument=behind, payload_bytes=size)
    return head + struct.pack(f"<{len(entries)}I", *entries)


def read_frame(sequence: int, firsts: Sequence[int], counts: Sequence[int], layer_id: int) -> bytes:
    """A READ of ranges of blocks; `layer_id` 0 reads the live volume."""
    payload = array("I", [*firsts, *counts]).tobytes()
    check, size = crc32c(payload), len(payload)
    header = _pack(MAGIC, VERSION, READ, 0, check, 0, sequence, layer_id, size)
    return header + _U32.pack(crc32c(header)) + payload


def read_ranges(payload: memoryview | None) -> tuple[list[int], list[int]]:
    """First blocks and block counts of a READ."""
    if payload is None or len(payload) % 8 or len(payload) > 8 * READS_MAX:
        raise WireError(f"a READ of {len(payload or b'')} bytes, not of 1 to {READS_MAX} ranges")
    values = payload.cast("I").tolist()
    count = len(values) // 2
    return values[:count], values[count:]


def covered_frame(
    operation: int, sequence: int, payload: bytes, *, offset: int = 0, argument: int = 0
) -> bytes:
    """A frame whose payload is covered by the CRC in its header."""
    head = frame(
        operation,
        sequence,
        length=crc32c(payload),
        offset=offset,
        argument=argument,
        payload_bytes=len(payload),
    )
    return head + payload


def extents_frame(sequence: int, runs: Sequence[tuple[int, bool]]) -> bytes:
    """An EXTENT_LIST of (block count, has data) runs."""
    payload = b"".join([_TWO_U32.pack(count, has_data) for count, has_data in runs])
    return covered_frame(EXTENT_LIST, sequence, payload)


def place(parent_id: int, first_block: int) -> int:
    """The `offset` of a LAYER_*, MEND or CHANGED, whose layer is the `argument`.

    The block count is in `flags`, except in CHANGED, where the bytes are in `length`.
    """
    return parent_id << 32 | first_block


def place_of(flags: int, offset: int, argument: int) -> tuple[int, int, int, int]:
    """Layer id, id of its logical parent, first block and block count of such a request."""
    return argument, offset >> 32, offset & 0xFFFFFFFF, flags


def map_checksum(payload: memoryview, count: int) -> int:
    """The `length` of a frame whose payload begins with the map entries of `count` blocks."""
    return crc32c(payload[: 4 * count])


def map_frame(
    operation: int, sequence: int, payload: memoryview, count: int, *, offset: int, argument: int
) -> bytes:
    """The header of a LAYER_DATA, LAYER_WRITE or MEND about `count` blocks."""
    return frame(
        operation,
        sequence,
        flags=count,
        length=map_checksum(payload, count),
        offset=offset,
        argument=argument,
        payload_bytes=len(payload),
    )


def json_frame(
    operation: int, sequence: int, content: dict[str, Any], *, argument: int = 0
) -> bytes:
    """A frame whose payload is a JSON object."""
    payload = json.dumps(content, separators=(",", ":")).encode()
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PeerError(
            f"a control message of {len(payload)} bytes is over the limit of {PAYLOAD_BYTES_MAX}; "
            "shorten snapshot labels"
        )
    return covered_frame(operation, sequence, payload, argument=argument)


def refused_frame(sequence: int, error: BlockdError) -> bytes:
    """REFUSED, with the error's code and message."""
    content = {"code": error.code, "message": str(error)}
    return json_frame(REFUSED, sequence, content, argument=error.errno)


def json_content(payload: memoryview | None) -> dict[str, Any]:
    """The JSON object of a control payload."""
    try:
        content = json.loads(bytes(payload or b"{}"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a control message is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WireError("a control message is not a JSON object")
    return content


def parse(
    buffer: bytearray | memoryview, view: memoryview, start: int, end: int, frames: list[Frame]
) -> int:
    """Append every whole frame of view[start:end] to `frames`; the new start.

    `view` is a view of `buffer`; payloads are slices of it.
    """
    while end - start >= HEADER_BYTES:
        magic, version, operation, flags, length, offset, sequence, argument, size, crc = _unpack(
            buffer, start
        )
        if crc32c(view[start : start + 36]) != crc or magic != MAGIC:
            raise WireError(f"a frame header is damaged or not ours (magic {magic:#010x})")
        if version != VERSION:
            raise WireError(f"wire version {version} is not spoken here; this side speaks 1")
        if size > PAYLOAD_BYTES_MAX:
            raise WireError(f"payload of {size} bytes is over the limit of {PAYLOAD_BYTES_MAX}")
        stop = start + HEADER_BYTES + size
        if stop > end:
            break
        payload = view[start + HEADER_BYTES : stop] if size else None
        covered = _COVERED[operation]
        if covered == _MAP:
            covered = 4 * flags
        if covered and payload is not None and crc32c(payload[:covered]) != length:
            raise WireError(f"the payload of a frame (operation {operation}) is damaged")
        frames.append((operation, flags, length, offset, sequence, argument, payload))
        start = stop
    return start


def fields(head: bytes) -> tuple[int, int, int, int, int, int, int]:
    """Operation, flags, length, offset, sequence, argument and payload bytes of a header that
    this process made itself."""
    _, _, operation, flags, length, offset, sequence, argument, size, _ = _unpack(head)
    return operation, flags, length, offset, sequence, argument, size


def needed(view: memoryview, start: int, end: int) -> int:
    """Bytes the first incomplete frame at `start` takes in all (its header was checked)."""
    if end - start < HEADER_BYTES:
        return HEADER_BYTES
    size: int = _unpack(view, start)[8]
    return HEADER_BYTES + size


def proof(key: bytes, role: str, first_nonce: str, second_nonce: str, volume_uuid: str) -> str:
    """Keyed BLAKE2b (RFC 7693) that `role` ("volume" or "replica") knows the volume's key."""
    message = f"blockd-wire-1|{role}|{first_nonce}|{second_nonce}|{volume_uuid}".encode()
    hashed_key = blake2b(key).digest()  # a key of any length becomes one of 64 bytes
    return blake2b(message, key=hashed_key, digest_size=32).hexdigest()


def same_proof(expected: str, given: object) -> bool:
    """Compare two proofs in a time that does not depend on where they differ."""
    return _compare_digest(expected.encode(), str(given).encode())
