"""What replicas answer to reads and extent requests, checked: payloads to chunks and runs.

Pure functions of the engine. A payload of another shape than asked for is a WireError, the peer's
fault; data that does not match its checksum is None, the disk's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from protocol import replica as wire
from protocol.checksum import ZEROS, block_checksum, crc32c
from protocol.units import BLOCK_BYTES

Chunks = list[tuple[int, memoryview | None]]
"""byte count and data (None = zeros), in order"""


def data_entries(payload: memoryview, counts: Sequence[int]) -> tuple[int, ...]:
    """The map entries of a DATA payload about ranges; WireError if its size is wrong."""
    blocks = sum(counts)
    if len(payload) < 4 * blocks:
        raise wire.WireError(f"a map of {blocks} blocks does not fit {len(payload)} bytes")
    entries = struct.unpack_from(f"<{blocks}I", payload)
    size = 4 * blocks + wire.HEADROOM_BYTES * len(counts) + data_bytes(entries)
    if len(payload) != size:
        raise wire.WireError(f"{len(payload)} bytes answered, the map says {size}")
    return entries


def data_bytes(entries: Sequence[int]) -> int:
    """How much data comes with these map entries."""
    return BLOCK_BYTES * sum(1 for entry in entries if entry > ZEROS)


def single_blocks(payload: memoryview, counts: Sequence[int]) -> memoryview | None:
    """Room and data of reads of one block each; None if not all are that, have data, and match.

    A CRC of 0 to 3, which an entry cannot be, counts as no match too.
    """
    count = len(counts)
    if len(payload) != (4 + wire.CELL_BYTES) * count or sum(counts) != count:
        return None
    cells = payload[4 * count :]
    checksums = list(map(crc32c, blocks_of(cells)))
    return cells if checksums == payload[: 4 * count].cast("I").tolist() else None


def blocks_of(cells: memoryview) -> list[memoryview]:
    """The blocks that lie in cells."""
    return [
        cells[at : at + BLOCK_BYTES]
        for at in range(wire.HEADROOM_BYTES, len(cells), wire.CELL_BYTES)
    ]


def data_chunks(
    entries: tuple[int, ...], payload: memoryview, position: int
) -> tuple[Chunks | None, int]:
    """The chunks of one range whose room begins at `position`, and where its data ends.

    None in place of the chunks: a block's checksum is wrong.
    """
    position += wire.HEADROOM_BYTES
    end = position + data_bytes(entries)
    chunks: Chunks = []
    index, count = 0, len(entries)
    while index < count:
        zeros = entries[index] <= ZEROS
        first = index
        begin = position
        while index < count and (entries[index] <= ZEROS) == zeros:
            if not zeros:
                block = payload[position : position + BLOCK_BYTES]
                if block_checksum(block) != entries[index]:
                    return None, end
                position += BLOCK_BYTES
            index += 1
        chunks.append(((index - first) * BLOCK_BYTES, None if zeros else payload[begin:position]))
    return chunks, end


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
