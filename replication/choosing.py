"""After fencing: which members are equal, which one is the truth, what the others lack.

After a clean end all IN_SYNC members are equal. After anything else they may differ in changes that
were under way. Every IN_SYNC member holds every change that was answered, unless its machine lost
power since, and every flushed one even then. So:

- a member whose machine has not been rebooted since it was last called equal (`unbroken`) goes
  before one that has; a consumer that still lives, with its caches, must not see what went back in
  time, so for it nobody else will do;
- among these, the one that applied most, if its process lives on and can say so;
- a member whose process lives on, too, lacks only changes that both list (`recent`): they are
  repeated before anybody reads, and it stays in sync;
- all others are OUT, and are compared with the source where zones are dirty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import DegradedError, LostWritesError
from replication.authority import IN_SYNC, Record

Hello = Mapping[str, Any]
"""what a member said of itself when it was fenced"""

Ranges = list[tuple[int, int]]
"""(first block, block count)"""

REPEATED_BLOCKS_MAX = 1 << 16  # 256 MiB: more than that is left to a resync


@dataclass(frozen=True)
class Choice:
    """`equal` members can be read at once; `behind` ones after these ranges were repeated."""

    source: str
    equal: tuple[str, ...]
    behind: Mapping[str, Ranges] = field(default_factory=dict)

    @property
    def in_sync(self) -> tuple[str, ...]:
        """All members that stay in sync."""
        return (*self.equal, *self.behind)


def is_stranger(record: Record, replica_uuid: str, hello: Hello) -> bool:
    """Is this another directory than the one that took part in the volume?

    Made anew and empty, or put back from an old copy: who was in sync when the volume was served
    has promised that epoch, and has grown with it. Asked before the member is fenced, which makes
    it promise.
    """
    member = record.members[replica_uuid]
    if member.state == IN_SYNC:
        too_small = hello["size_bytes"] < record.size_bytes
        return bool(too_small or hello["promised_epoch"] < record.served_epoch)
    return bool(member.out_at and hello["promised_epoch"] < member.in_epoch)


def choose(
    record: Record, hellos: Mapping[str, Hello], was_clean: bool, consumer_alive: bool
) -> Choice:
    """Judge the fenced members; DegradedError if none will do."""
    name = record.volume_name
    candidates = [
        uuid
        for uuid, member in record.members.items()
        if member.state == IN_SYNC and uuid in hellos and hellos[uuid]["complete"]
    ]
    if not candidates:
        raise DegradedError(f"volume {name} has no complete replica in sync that can be reached")
    if was_clean:
        return Choice(candidates[0], tuple(candidates))
    unbroken = [uuid for uuid in candidates if hellos[uuid]["unbroken"]]
    if consumer_alive and not unbroken:
        raise LostWritesError(
            f"every replica of volume {name} that can be reached was on a machine that was "
            "rebooted and may have lost writes that its user has not flushed; detach the volume "
            "and attach it again to go on from what is on the disks"
        )
    pool = unbroken or candidates
    source = max(pool, key=lambda uuid: tuple(hellos[uuid]["position"][:2]))
    top = hellos[source]
    equal, behind = [source], {}
    for uuid in pool:
        if uuid == source or not _comparable(top, hellos[uuid]):
            continue
        ranges = _difference(top, hellos[uuid])
        if ranges == []:
            equal.append(uuid)
        elif ranges is not None:
            behind[uuid] = ranges
    return Choice(source, tuple(equal), behind)


def _comparable(top: Hello, other: Hello) -> bool:
    """Did both processes live through the same session, and apply everything they were sent?"""
    epoch, _, refused = top["position"]
    return bool(
        epoch
        and other["position"][0] == epoch
        and not refused
        and not other["position"][2]
        and other["head_id"] == top["head_id"]
    )


def _difference(top: Hello, other: Hello) -> Ranges | None:
    """The ranges in which two comparable members may differ; None: not known, or too much."""
    last = other["position"][1]
    if last < top["recent"]["base"] or last < other["recent"]["base"]:
        return None
    changes = [*top["recent"]["changes"], *other["recent"]["changes"]]
    ranges = sorted({(int(first), int(count)) for seq, first, count in changes if seq > last})
    return ranges if sum(count for _, count in ranges) <= REPEATED_BLOCKS_MAX else None
