"""What a rebuild has to look at: regions of logical layers, and how they are cut into jobs.

A region of a layer is looked at if it lies in one of the zones in which the member may differ, or
if the layer is new to the member. Where only the source has anything it is copied without
comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from protocol.errors import BlockdError
from protocol.trees import Tree
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, REGIONS_PER_ZONE
from replication.walks import Question, ask_regions

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

    def ask_regions(
        self,
        rebuild: Rebuild,
        source: Link,
        then: Callable[[], None],
        failed: Callable[[BlockdError], None],
    ) -> None:
        """Ask source and member which regions each layer has, then `then()`."""
        questions: list[Question] = []
        for layer in self.tree:
            layer_id = int(layer["id"])
            for link, found in ((source, self._theirs), (rebuild.link, self._ours)):
                regions = found.setdefault(layer_id, set())
                questions.append((link, layer, partial(self._note, layer_id, regions)))

        def all_known() -> None:
            self._count()
            then()

        ask_regions(rebuild.ask, questions, all_known, failed)

    def _note(self, layer_id: int, regions: set[int], region: int) -> None:
        if (
            self.every_zone
            or region // REGIONS_PER_ZONE in self.zones
            or layer_id in self.all_zones_of
        ):
            regions.add(region)

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
                for first in job_starts(region):
                    yield layer_id, parent_id, first, JOB_BLOCKS, compare


def job_starts(region: int) -> range:
    """The first blocks of the jobs of a region, JOB_BLOCKS each."""
    start = region * BLOCKS_PER_REGION
    return range(start, start + BLOCKS_PER_REGION, JOB_BLOCKS)


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
