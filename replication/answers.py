"""What replicas answer to reads and extent requests, checked: payloads to chunks and runs.

Pure functions of the engine. A payload of another shape than asked for is a WireError, the peer's
fault; data that does not match its checksum is None, the disk's.
"""

from __future__ import annotations

import struct

from protocol import replica as wire
from protocol.checksum import ZEROS, block_checksum
from protocol.units import BLOCK_BYTES

Chunks = list[tuple[int, memoryview | None]]
"""byte count and data (None = zeros), in order"""


def data_chunks(length: int, payload: memoryview) -> Chunks | None:
    """The chunks of a DATA payload about `length` bytes; None if a block's checksum is wrong."""
    count = length // BLOCK_BYTES
    if len(payload) < 4 * count:
        raise wire.WireError(f"a map of {count} blocks does not fit {len(payload)} bytes")
    entries = struct.unpack_from(f"<{count}I", payload)
    position = 4 * count
    chunks: Chunks = []
    index = 0
    while index < count:
        zeros = entries[index] <= ZEROS
        first = index
        start = position
        while index < count and (entries[index] <= ZEROS) == zeros:
            if not zeros:
                block = payload[position : position + BLOCK_BYTES]
                if len(block) != BLOCK_BYTES or block_checksum(block) != entries[index]:
                    return None
                position += BLOCK_BYTES
            index += 1
        chunks.append(((index - first) * BLOCK_BYTES, None if zeros else payload[start:position]))
    if position != len(payload):
        raise wire.WireError(f"{len(payload) - position} bytes too many in an answer")
    return chunks


def clip(chunks: Chunks, lead: int, wanted: int) -> Chunks:
    """`wanted` bytes of the chunks, after the first `lead` ones."""
    clipped: Chunks = []
    for count, data in chunks:
        if lead >= count:
            lead -= count
            continue
        take = min(count - lead, wanted)
        clipped.append((take, None if data is None else data[lead : lead + take]))
        wanted -= take
        lead = 0
        if not wanted:
            break
    return clipped


def extent_runs(payload: memoryview, blocks: int) -> list[tuple[int, bool]]:
    """The runs of an EXTENT_LIST about `blocks` blocks; WireError if they do not fit."""
    if len(payload) % 8:
        raise wire.WireError(f"an extent list of {len(payload)} bytes")
    values = struct.unpack(f"<{len(payload) // 4}I", payload)
    runs = [(count, bool(data)) for count, data in zip(values[::2], values[1::2], strict=True)]
    if not runs or not all(count for count, _ in runs) or sum(c for c, _ in runs) > blocks:
        raise wire.WireError(f"an extent list that does not describe {blocks} blocks")
    return runs
