"""What a volume daemon does to make one replica equal to another, without the daemon."""

from __future__ import annotations

from typing import Any

from protocol.trees import logical_tree
from protocol.units import BLOCKS_PER_REGION, REGIONS_PER_ZONE
from snapshots.logical import DIGEST_BYTES
from snapshots.replica import Replica

BUFFER = memoryview(bytearray(BLOCKS_PER_REGION * 4100))


def tree_of(replica: Replica) -> list[dict[str, Any]]:
    return logical_tree([vars(layer) for layer in replica.tree()], replica.metadata.head_id)


class Sync:
    """Makes `target` equal to `source`; `steps` yields after each small step."""

    def __init__(self, source: Replica, target: Replica, since: int, *, fresh: bool = False):
        self.source = source
        self.target = target
        self.since = since
        self.fresh = fresh
        self.copied_blocks = 0
        self.compared_blocks = 0

    def begin(self) -> None:
        source, target = self.source, self.target
        self.tree = tree_of(source)
        zones, new = target.begin_sync(
            self.tree, source.metadata.head_id, "v", "name", source.size_bytes, fresh=self.fresh
        )
        self.zones = {*source.dirty.changed_since(self.since), *zones}
        self.new = set(new)

    def copy(self) -> None:
        for layer in self.tree:
            for region in self.regions(layer["id"], layer["parent"]):
                self.copy_region(layer["id"], layer["parent"], region)

    def regions(self, layer_id: int, parent_id: int) -> list[int]:
        """Regions to compare: those in the zones, and all of layers that are new here."""
        found: set[int] = set()
        for replica in (self.source, self.target):
            for first, count in replica.layer_regions(layer_id, parent_id):
                found.update(range(first, first + count))
        return sorted(
            region
            for region in found
            if layer_id in self.new or region // REGIONS_PER_ZONE in self.zones
        )

    def copy_region(self, layer_id: int, parent_id: int, region: int) -> None:
        base = region * BLOCKS_PER_REGION
        theirs = self.source.layer_digests(layer_id, parent_id, base, BLOCKS_PER_REGION)
        ours = self.target.layer_digests(layer_id, parent_id, base, BLOCKS_PER_REGION)
        self.compared_blocks += BLOCKS_PER_REGION
        number = 0
        while number < BLOCKS_PER_REGION:
            start = number
            while number < BLOCKS_PER_REGION and _digest(theirs, number) != _digest(ours, number):
                number += 1
            if start < number:
                self.copy_blocks(layer_id, parent_id, base + start, number - start)
            number += 1

    def copy_blocks(self, layer_id: int, parent_id: int, first: int, count: int) -> None:
        used = self.source.layer_read(layer_id, parent_id, first, count, BUFFER)
        entries = BUFFER[: 4 * count].cast("I")
        self.target.layer_write(layer_id, parent_id, first, entries, BUFFER[4 * count : used])
        self.copied_blocks += (used - 4 * count) // 4096

    def end(self) -> None:
        target = self.target
        for layer in self.tree:
            for region in self.regions(layer["id"], layer["parent"]):
                arguments = (layer["id"], layer["parent"], region, 1)
                assert self.source.layer_check(*arguments) == target.layer_check(*arguments)
        target.dirty.raise_stamps(
            {zone: self.source.dirty.stamp(zone, 99) for zone in range(len(target.dirty.zones))}
        )
        target.flush()
        for zone in target.dirty.dirty_zones():
            target.index_zone(zone)
        target.sync_tables()
        target.end_sync()

    def run(self) -> Sync:
        self.begin()
        self.copy()
        self.end()
        return self


def _digest(digests: bytes, number: int) -> bytes:
    return digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
