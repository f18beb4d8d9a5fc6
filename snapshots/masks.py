"""Which blocks of a region a map block names, for 1024 blocks at a time.

A mask is an int of 1024 bytes (little-endian, block 0 lowest), 0xFF per block that has the
property, so that whole regions are combined with & and | instead of block by block. The result of
`resolve` is what the index holds: one byte per block, the slot of the layer whose data is visible,
0 where the block reads as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION

EMPTY_MAP = bytes(BLOCK_BYTES)
EVERY_BLOCK = int.from_bytes(b"\xff" * BLOCKS_PER_REGION, "little")
SLOT_BYTES = [bytes([slot]) for slot in range(256)]
SLOT_RUNS = [SLOT_BYTES[slot] * BLOCKS_PER_REGION for slot in range(256)]
_SLOT_MASKS = [int.from_bytes(run, "little") for run in SLOT_RUNS]
_FULL = bytes([0]) + b"\xff" * 255  # any bit set in a byte: the whole byte
_NOT_ZEROS = bytes([0, 1, 2, 0]) + bytes(range(4, 256))  # drops the low byte of a ZEROS entry


def masks(map_block: bytes) -> tuple[int, int]:
    """(present, data): the blocks with any entry, the blocks whose entry is a checksum.

    An entry that cannot be (1, 2) counts as a checksum: reading it shows that it is damaged.
    """
    low = map_block[0::4]
    high = (
        int.from_bytes(map_block[1::4], "little")
        | int.from_bytes(map_block[2::4], "little")
        | int.from_bytes(map_block[3::4], "little")
    )
    present = (int.from_bytes(low, "little") | high).to_bytes(BLOCKS_PER_REGION, "little")
    data = int.from_bytes(low.translate(_NOT_ZEROS), "little") | high
    return (
        int.from_bytes(present.translate(_FULL), "little"),
        int.from_bytes(data.to_bytes(BLOCKS_PER_REGION, "little").translate(_FULL), "little"),
    )


def resolve(map_blocks: Iterable[tuple[int, bytes]]) -> bytes:
    """The slots of one region from (slot, map block) pairs, youngest layer first."""
    resolving = Resolving()
    for slot, map_block in map_blocks:
        if map_block == EMPTY_MAP:
            continue
        resolving.add(slot, map_block)
        if not resolving.open_blocks:
            break
    return resolving.slots()


class Resolving:
    """The slots of one region while the maps of its layers come in, youngest first."""

    __slots__ = ("_slots", "open_blocks")

    def __init__(self) -> None:
        self.open_blocks = EVERY_BLOCK  # blocks that no layer so far has an entry for
        self._slots = 0

    def add(self, slot: int, map_block: bytes) -> None:
        """The map of the next older layer."""
        present, data = masks(map_block)
        self._slots |= data & self.open_blocks & _SLOT_MASKS[slot]
        self.open_blocks &= ~present

    def slots(self) -> bytes:
        """One byte per block."""
        return self._slots.to_bytes(BLOCKS_PER_REGION, "little")


def run_length(values: bytes, start: int) -> int:
    """How many bytes from `start` on are equal to the first of them."""
    tail = values[start:]
    return len(tail) - len(tail.lstrip(SLOT_BYTES[tail[0]]))


def runs(mask: int) -> list[tuple[int, int]]:
    """(first block in the region, count) of each run of blocks in a mask."""
    flags = mask.to_bytes(BLOCKS_PER_REGION, "little")
    found = []
    start = flags.find(0xFF)
    while start >= 0:
        count = run_length(flags, start)
        found.append((start, count))
        start = flags.find(0xFF, start + count)
    return found


def span(start: int, count: int) -> int:
    """The mask of `count` blocks from `start` on."""
    return ((1 << (count * 8)) - 1) << (start * 8)
