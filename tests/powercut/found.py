"""Everything that is to be seen of an open replica."""

from __future__ import annotations

from dataclasses import dataclass

from snapshots.replica import Replica
from tests.powercut.expected import ZERO, Blocks
from tests.snapshots.model import RANGES, read_blocks


@dataclass
class Found:
    """What an open replica holds."""

    head_id: int
    live: Blocks
    snapshots: dict[int, Blocks]


def read(replica: Replica) -> Found:
    present = [info.id for info in replica.tree() if info.name and not info.removed]
    snapshots = {layer_id: read_all(replica, layer_id) for layer_id in present}
    return Found(replica.metadata.head_id, read_all(replica), snapshots)


def read_all(replica: Replica, layer_id: int = 0) -> Blocks:
    """Everything the history can have touched."""
    found: Blocks = {}
    for first, count in RANGES:
        for number, content in enumerate(read_blocks(replica, first, count, layer_id)):
            if content != ZERO:
                found[first + number] = content
    return found
