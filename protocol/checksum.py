"""The checksum of one 4 KiB block, as it stands in layer maps and on the replica wire.

It is CRC32C (RFC 3720, appendix B.4) with two values set aside: an entry 0 means the block is
absent from the layer, 1 means it is all zeros. A CRC of 0 or 1 is therefore written as 2 or 3.
"""

from __future__ import annotations

from crc32c import crc32c

from protocol.units import BLOCK_BYTES

ABSENT = 0
ZEROS = 1


def block_checksum(block: memoryview | bytes | bytearray) -> int:
    """The map entry of one block of data."""
    crc: int = crc32c(block)
    return crc if crc > ZEROS else crc + 2


def block_checksums(data: memoryview) -> list[int]:
    """The map entries of consecutive whole blocks."""
    entries = []
    for start in range(0, len(data), BLOCK_BYTES):
        crc = crc32c(data[start : start + BLOCK_BYTES])
        entries.append(crc if crc > ZEROS else crc + 2)
    return entries
