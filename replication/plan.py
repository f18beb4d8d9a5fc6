"""What a rebuild has to look at: regions of logical layers, and how they are cut into jobs.

A region of a layer is looked at if it lies in one of the zones in which the member may differ, or
if the layer is new to the member. Where only the source has anything it is copied without
comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGIONS_PER_ZONE
from replication.trees import Tree

if TYPE_CHECKING:
    from replication.link import Link
    from replication.rebuild import Rebuild

JOB_BLOCKS = 128  # half a mebibyte is hashed or written before other requests come in between
CHECK_REGIONS = 64  # of one verification: the maps of 256 MiB

Job = tuple[int, int, int, int, bool]
"""layer id, logical parent id, first block, block count, is it to be compared?"""


class Plan:
    """The work of one attempt."""

    def __init__(self, tree: Tree, head_id: int) -> None:
        self.tree = tree
        self.head_id = head_id
        self.every_zone = False
        self.all_zones_of: set[int] = set()
        self.zones: set[int] = set()
        self._theirs: dict[int, set[int]] = {}  # regions by layer, of the source
        self._ours: dict[int, set[int]] = {}  # of the member
        self.total_bytes = 0

    def add_zones(self, runs: Iterable[tuple[int, int]]) -> None:
        """Zones, as (first, count), in which the member may differ."""
        for first, count in runs:
            self.zones.update(range(int(first), int(first) + int(count)))

    def _wanted(self, layer_id: int, region: int) -> bool:
        return (
            self.every_zone
            or region // REGIONS_PER_ZONE in self.zones
            or layer_id in self.all_zones_of
        )

    def ask_regions(
        self,
        rebuild: Rebuild,
        source: Link,
        then: Callable[[], None],
        failed: Callable[[BlockdError], None],
    ) -> None:
        """Ask source and member which regions each layer has, then `then()`."""
        questions = [
            (link, found, layer)
            for layer in self.tree
            for link, found in ((source, self._theirs), (rebuild.link, self._ours))
        ]

        def next_question(first: int = 0) -> None:
            if not questions:
                self._count()
                then()
                return
            link, _, layer = questions[0]
            content = {"do": "layer_regions", "layer_id": layer["id"], "parent_id": layer["parent"]}
            rebuild.ask(link, {**content, "first": first}, answered, failed)

        def answered(answer: dict[str, Any]) -> None:
            _, found, layer = questions[0]
            layer_id = int(layer["id"])
            regions = found.setdefault(layer_id, set())
            following = answer["next"]
            for first, count in answer["regions"]:
                for region in range(int(first), int(first) + int(count)):
                    if self._wanted(layer_id, region):
                        regions.add(region)
            if following is None:
                del questions[0]
            next_question(0 if following is None else int(following))

        next_question()

    def regions(self, layer_id: int) -> list[int]:
        """The regions of a layer to look at."""
        return sorted(self._theirs[layer_id] | self._ours[layer_id])

    def _count(self) -> None:
        blocks = sum(len(self.regions(layer["id"])) for layer in self.tree) * BLOCKS_PER_REGION
        self.total_bytes = blocks * BLOCK_BYTES

    def copy_jobs(self) -> Iterator[Job]:
        """All jobs, a layer after those below it."""
        for layer in self.tree:
            layer_id, parent_id = int(layer["id"]), int(layer["parent"])
            for region in self.regions(layer_id):
                compare = region in self._ours[layer_id]
                start = region * BLOCKS_PER_REGION
                for first in range(start, start + BLOCKS_PER_REGION, JOB_BLOCKS):
                    yield layer_id, parent_id, first, JOB_BLOCKS, compare


def check_jobs(plan: Plan) -> Iterator[tuple[int, int, int, int]]:
    """(layer id, parent id, first region, count) that cover every region of the plan."""
    for layer in plan.tree:
        layer_id, parent_id = int(layer["id"]), int(layer["parent"])
        regions = plan.regions(layer_id)
        at = 0
        while at < len(regions):
            first, end = regions[at], at + 1
            while end < len(regions) and regions[end] == first + end - at < first + CHECK_REGIONS:
                end += 1
            yield layer_id, parent_id, first, end - at
            at = end
