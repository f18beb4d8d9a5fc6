"""A plain model of a replica, a driver that applies operations to both, and their comparison.

The volume is sparse on purpose: a handful of interesting blocks around region and zone bounds, so
that 48 MiB behave like a large volume and a comparison is quick.
"""

from __future__ import annotations

import gc
from pathlib import Path
from random import Random

from protocol.checksum import ZEROS, block_checksum, block_checksums
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE
from snapshots.replica import Replica

REGION, ZONE = BLOCKS_PER_REGION, BLOCKS_PER_ZONE
BLOCK_COUNT = 2 * ZONE + REGION + 100  # three zones, the last region is cut short
SIZE_BYTES = BLOCK_COUNT * BLOCK_BYTES
RANGES = [  # first block, count: everything a test touches
    (0, 12),
    (REGION - 6, 12),
    (ZONE - 6, 12),
    (2 * ZONE + REGION - 3, 6),
    (BLOCK_COUNT - 6, 6),
]
BLOCKS = [block for first, count in RANGES for block in range(first, first + count)]
ZERO = bytes(BLOCK_BYTES)

Content = dict[int, int]  # block to fill byte, absent = zeros


def fill(number: int) -> bytes:
    """The block that stands for a number; 0 is a block of zeros."""
    return number.to_bytes(4, "little") * (BLOCK_BYTES // 4)


def read_blocks(replica: Replica, first: int, count: int, layer_id: int = 0) -> list[bytes]:
    """The content of blocks, with every entry checked against its data."""
    target = memoryview(bytearray(count * (BLOCK_BYTES + 4)))
    used = replica.read_into(first, count, target, layer_id)
    position, found = 4 * count, []
    for entry in target[:position].cast("I"):
        if entry == ZEROS:
            found.append(ZERO)
            continue
        block = target[position : position + BLOCK_BYTES]
        assert block_checksum(block) == entry
        found.append(bytes(block))
        position += BLOCK_BYTES
    assert position == used
    return found


def write(replica: Replica, first: int, numbers: list[int]) -> None:
    """Write blocks filled with numbers."""
    data = memoryview(b"".join(map(fill, numbers)))
    replica.write(first, len(numbers), data, block_checksums(data))


class Model:
    """What the volume and every snapshot must read as, next to the replica."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: Content = {}
        self.flushed: Content = {}
        self.snapshots: dict[int, Content] = {}  # by layer id
        self.next_id = 2
        Replica.create(path, size_bytes=SIZE_BYTES, replica_uuid="r", head_id=1)
        self.replica = Replica.open(path)

    @classmethod
    def opened(cls, path: Path, live: Content, next_id: int) -> Model:
        """That of a replica that is there and shows `live`."""
        model = cls.__new__(cls)
        model.path, model.live, model.flushed = path, dict(live), {}
        model.snapshots, model.next_id = {}, next_id
        model.replica = Replica.open(path)
        return model

    def write(self, first: int, numbers: list[int]) -> None:
        write(self.replica, first, numbers)
        for offset, number in enumerate(numbers):
            self.live[first + offset] = number

    def zero(self, first: int, count: int, keep_allocated: bool = False) -> None:
        self.replica.zero(first, count, keep_allocated=keep_allocated)
        for block in [block for block in self.live if first <= block < first + count]:
            del self.live[block]

    def seal(self) -> int:
        head = self.replica.metadata.head_id
        self.replica.seal(self.next_id, f"s{head}", "2026-01-01T00:00:00Z", {"k": "v"})
        self.next_id += 1
        self.snapshots[head] = dict(self.live)
        return head

    def remove(self, layer_id: int) -> None:
        self.replica.remove(layer_id)
        del self.snapshots[layer_id]

    def revert(self, layer_id: int) -> None:
        self.replica.revert(layer_id, self.next_id)
        self.next_id += 1
        self.live = dict(self.snapshots[layer_id])

    def grow(self, more_blocks: int) -> None:
        """The volume gets longer; what is new reads as zeros, also where nothing looks later."""
        before = self.replica.block_count
        self.replica.grow((before + more_blocks) * BLOCK_BYTES)
        assert self.replica.block_count == before + more_blocks
        for first in (before, before + more_blocks - 1):
            assert read_blocks(self.replica, first, 1) == [ZERO]
            write(self.replica, first, [first])
            assert read_blocks(self.replica, first, 1) == [fill(first)]
            self.replica.zero(first, 1)

    def reopen(self) -> None:
        self.replica.close()
        self.replica = Replica.open(self.path)

    def crash(self) -> None:
        """kill -9 after a flush: the page cache survives."""
        self.replica.flush()
        kill(self.replica)
        self.replica = Replica.open(self.path)

    def check(self, *, extents: bool = True) -> None:
        compare(self.replica, self.live, extents=extents)
        for layer_id, content in self.snapshots.items():
            compare(self.replica, content, layer_id, extents=extents)


def kill(replica: Replica) -> None:
    """Leave the files as a killed process leaves them."""
    replica.abandon()
    gc.collect()


def compare(replica: Replica, content: Content, layer_id: int = 0, *, extents: bool = True) -> None:
    """Content and extents of the volume, or of one snapshot, must be these."""
    for first, count in RANGES:
        expected = [fill(content.get(block, 0)) for block in range(first, first + count)]
        assert read_blocks(replica, first, count, layer_id) == expected, (layer_id, first)
    if not extents:
        return
    is_data: list[bool] = []
    for count, data in replica.extents(0, BLOCK_COUNT, layer_id):
        is_data += [data] * count
    assert len(is_data) == BLOCK_COUNT
    for block in range(BLOCK_COUNT):
        if not is_data[block]:
            assert content.get(block, 0) == 0, (layer_id, block)
    assert sum(is_data) <= len(BLOCKS)


def grown(directory: Path, seed: int, steps: int = 60) -> Model:
    """A replica with a random history of everything that can be done to it."""
    random, model = Random(seed), Model(directory)
    for _ in range(steps):
        first, count = random.choice(RANGES)
        start = random.randrange(count)
        length = random.randint(1, count - start)
        kind = random.random()
        if kind < 0.5:
            model.write(first + start, [random.randrange(1 << 20) for _ in range(length)])
        elif kind < 0.65:
            model.zero(first + start, length)
        elif kind < 0.85 and len(model.snapshots) < 8:
            model.seal()
        elif kind < 0.9 and model.snapshots:
            model.remove(random.choice(sorted(model.snapshots)))
        elif kind < 0.93 and model.snapshots:
            model.revert(random.choice(sorted(model.snapshots)))
        else:
            model.replica.flush()
            model.replica.maintain()
    return model
