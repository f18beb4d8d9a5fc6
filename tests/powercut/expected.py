"""What a replica must hold after a power cut at any time of a recorded history.

The history of a block is its contents with the times from which on they may be seen. A flush that
ended before the cut covers everything that was applied when it began; of what came later each block
holds any, sector by sector. A snapshot is there, exactly, once a flush or anything else durable
came after its seal, and gone once its removal returned. A revert happens as a whole.

Every change is also one that the other members have: a block that is not the newest after the cut
must lie in a zone that recovery reports. So must all that no stable flush covers, because another
member may have less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE

ZERO = bytes(BLOCK_BYTES)
NEVER = 1 << 60

Blocks = dict[int, bytes]
"""content by block; blocks that are missing are zeros"""


@dataclass
class Flush:
    """One flush: what was applied at `begun` is durable from `ended` on."""

    begun: int
    ended: int = NEVER
    stable: int = NEVER  # when its owner said that all members have it


@dataclass
class Snapshot:
    """One sealed layer with a name."""

    content: Blocks
    sealed: int  # when the seal began
    sealed_end: int = NEVER
    durable: int = NEVER  # not before
    removing: int = NEVER
    removed: int = NEVER


@dataclass
class Revert:
    """The content of a snapshot taken over as a whole."""

    head_id: int
    begun: int
    ended: int = NEVER


@dataclass
class Expected:
    """Filled by the history while it runs, asked afterwards about any time."""

    blocks: tuple[int, ...]
    flushes: list[Flush] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    reverts: list[Revert] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)  # power cut, opened and read again
    live: Blocks = field(default_factory=dict)
    damaged: dict[int, list[tuple[int, int, bytes]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._past: dict[int, list[tuple[int, bytes]]] = {b: [(0, ZERO)] for b in self.blocks}
        self._applied: dict[int, list[tuple[int, bytes]]] = {b: [(0, ZERO)] for b in self.blocks}
        self._changed: dict[int, list[int]] = {}  # zone to times at which it was applied

    # ---- filling --------------------------------------------------------------------------------

    def change(self, time: int, contents: Mapping[int, bytes]) -> None:
        """Blocks may be seen with these contents from `time` on; `applied` comes next."""
        for block, content in contents.items():
            if self.live.get(block, ZERO) != content:
                self._past[block].append((time, content))
                self.live[block] = content

    def applied(self, time: int) -> None:
        """All changes so far can have been answered: they are on the other members for certain."""
        for block, past in self._past.items():
            if self._applied[block][-1][1] != past[-1][1]:
                self._applied[block].append((time, past[-1][1]))
                self._changed.setdefault(block // BLOCKS_PER_ZONE, []).append(time)

    def flush_ended(self, flush: Flush, time: int) -> None:
        """A flush was answered."""
        flush.ended = time
        for snapshot in self.snapshots.values():
            if snapshot.sealed_end <= flush.begun:
                snapshot.durable = min(snapshot.durable, time)

    def cut(
        self, time: int, read_at: int, live: Blocks, there: Iterable[int], zones: set[int]
    ) -> None:
        """The history itself lost power, and went on with what was read afterwards."""
        self.cuts.append((time, read_at))
        for block in self.blocks:
            content = live.get(block, ZERO)
            zone = block // BLOCKS_PER_ZONE
            if content != self.live.get(block, ZERO) or zone in zones:
                self._changed.setdefault(zone, []).append(read_at)
            self._past[block].append((read_at, content))
            self._applied[block].append((read_at, content))
        self.live = dict(live)
        self.flushes.append(Flush(read_at, read_at))
        kept = set(there)
        for layer_id, snapshot in self.snapshots.items():
            if layer_id in kept:
                snapshot.durable = min(snapshot.durable, read_at)
            else:
                snapshot.removed = min(snapshot.removed, read_at)

    def rebased(self, time: int, live: Blocks, snapshots: Mapping[int, Blocks]) -> Expected:
        """What holds once the replica was made equal to another member, durably."""
        new = Expected(self.blocks)
        new.change(0, live)
        new.applied(0)
        new.flushes.append(Flush(time, time, time))
        for layer_id, content in snapshots.items():
            new.snapshots[layer_id] = Snapshot(dict(content), 0, 0, 0)
        return new

    # ---- asking ---------------------------------------------------------------------------------

    def _effective(self, time: int) -> int:
        """Between a cut of the history and its opening nothing new was promised."""
        for begin, end in self.cuts:
            if begin <= time < end:
                return begin
        return time

    def _floor(self, time: int) -> int:
        return max((flush.begun for flush in self.flushes if flush.ended <= time), default=0)

    def allowed(self, block: int, time: int, head_id: int) -> list[bytes]:
        """All contents whose sectors the block may consist of."""
        time = self._effective(time)
        hidden = NEVER
        for revert in self.reverts:
            if revert.begun <= time < revert.ended:
                if head_id == revert.head_id:
                    return [self._at(block, revert.begun)]
                hidden = revert.begun
        floor, found = self._floor(time), []
        for at, content in self._past[block]:
            if at <= floor:
                found = [content]
            elif at <= time and at < hidden:
                found.append(content)
        for begin, end, content in self.damaged.get(block, ()):
            if begin <= time < end:
                found.append(content)
        return found

    def _at(self, block: int, time: int) -> bytes:
        return [content for at, content in self._past[block] if at <= time][-1]

    def newest(self, time: int) -> Blocks:
        """What the other members hold for certain."""
        time = self._effective(time)
        return {
            block: [content for at, content in self._applied[block] if at <= time][-1]
            for block in self.blocks
        }

    def unstable_zones(self, time: int) -> set[int]:
        """Zones that may differ from another member, whatever is here."""
        time = self._effective(time)
        floor = max((f.begun for f in self.flushes if f.stable <= time), default=0)
        return {
            zone for zone, times in self._changed.items() if any(floor < at <= time for at in times)
        }

    def must_snapshots(self, time: int) -> set[int]:
        """Snapshots that are there."""
        time = self._effective(time)
        return {
            layer_id
            for layer_id, snapshot in self.snapshots.items()
            if snapshot.durable <= time < min(snapshot.removing, snapshot.removed)
        }

    def may_snapshots(self, time: int) -> set[int]:
        """Snapshots that may be there."""
        time = self._effective(time)
        return {
            layer_id
            for layer_id, snapshot in self.snapshots.items()
            if snapshot.sealed <= time < snapshot.removed
        }
