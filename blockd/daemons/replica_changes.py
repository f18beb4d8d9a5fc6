"""Changes of one replica in the order its owner sent them, and what happens when the disk is full.

A change that finds no space is parked, with its data, and so is every later one that has to come
after it: all writes, and trims that overlap with parked changes. Other trims go on, so that a full
disk can be emptied. Parked changes are tried again after every trim and every RETRY_SECONDS; the
owner hears FULL when the first one is parked, holds new writes back, and hears APPLIED when all is
well again. Bytes parked are therefore those that were under way. Nothing parked was answered: when
the session ends they are forgotten, like what never arrived.

Members that have space applied these changes. So that all members show one order, whatever would
see that parked changes are missing waits behind them: reads and copies of the same blocks, and what
asks about the whole replica. Snapshots and reverts hold everything up that comes after them, too.

`recent` lists the last changes, until the owner says that every member has applied them: after the
owner's death members that are still alive differ in nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from protocol import replica as wire
from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES
from snapshots.reserve import FULL_DISK

if TYPE_CHECKING:
    from blockd.daemons.replica_service import ReplicaService

Reach = Sequence[tuple[int, int]]
"""(first block, block count) of each range"""

EVERYTHING: Reach = ((0, 1 << 62),)
RETRY_SECONDS = 0.5  # between attempts while the disk is full
RECENT_MAX = 1 << 14  # changes remembered; more than any owner has under way for long


@dataclass(frozen=True)
class Change:
    """A WRITE (with data) or a ZERO."""

    sequence: int
    first: int
    count: int
    data: memoryview | None = None
    checksums: Sequence[int] = ()
    keep: bool = False

    def overlaps(self, first: int, count: int) -> bool:
        """Does it touch any of these blocks?"""
        return self.first < first + count and first < self.first + self.count


@dataclass(frozen=True)
class Waiting:
    """What is no change, but has to come after some that are parked."""

    run: Callable[[], None]
    holds_all: bool

    def overlaps(self, first: int, count: int) -> bool:
        """May a change of these blocks not overtake it?"""
        return self.holds_all


def reach(
    operation: int, flags: int, length: int, offset: int, argument: int, content: memoryview | None
) -> tuple[Reach, bool] | None:
    """Which blocks a request looks at, and whether no change may overtake it; None: at none."""
    if operation == wire.READ and not argument:
        return list(zip(*wire.read_ranges(content), strict=True)), False
    if operation == wire.EXTENTS and not argument:
        return [(offset // BLOCK_BYTES, length // BLOCK_BYTES)], False
    if operation == wire.CHANGED and not argument:
        return [(wire.place_of(0, offset, 0)[2], length // BLOCK_BYTES)], False
    if operation in (wire.LAYER_READ, wire.LAYER_HASH, wire.LAYER_WRITE, wire.MEND):
        _, _, first, count = wire.place_of(flags, offset, argument)
        return [(first, count)], False
    if operation == wire.CONTROL:
        what = wire.json_content(content).get("do")
        if what in ("seal", "revert", "grow", "zones", "stamps", "layer_regions", "layer_check"):
            return EVERYTHING, what in ("seal", "revert", "grow")
    return None


class Owner(Protocol):
    """The newest fenced session, as far as changes are concerned."""

    def full(self, sequence: int, errno: int) -> None:
        """The change with this sequence, and what has to come after it, waits for space."""

    def room(self, sequence: int) -> None:
        """Everything up to `sequence` is applied after all."""

    def refused(self, sequence: int, error: BlockdError) -> None:
        """A change that waited failed for good."""


class ReplicaChanges:
    """The order of changes of one replica, in the loop that owns it."""

    def __init__(self, service: ReplicaService) -> None:
        self._service = service
        self._replica = service.replica
        self.parked: deque[Change | Waiting] = deque()
        self.owner: Owner | None = None
        self.position = (0, 0)  # epoch and sequence of the last change applied in order
        self.recent: deque[tuple[int, int, int]] = deque()  # sequence, first block, count
        self.recent_base = 0  # changes up to this sequence are not listed
        self._epoch = 0  # of the changes in `recent`
        self._newest = 0  # sequence of the last change that arrived
        self._retrying = False

    def new_owner(self, owner: Owner | None) -> None:
        """A session was fenced or ended: what an older one had parked is as if it never came."""
        self.parked.clear()
        self.owner = owner

    def write(
        self, sequence: int, first: int, count: int, data: memoryview, checksums: Sequence[int]
    ) -> bool:
        """Apply a write; False: it is parked. Any other failure is raised."""
        self._newest = sequence
        if not self.parked:
            try:
                self._replica.write(first, count, data, checksums)
            except BlockdError as error:
                if error.errno not in FULL_DISK:
                    raise
                self._first_parked(sequence, error)
            else:
                if self._epoch != self._service.epoch:
                    self._begin_epoch(sequence)
                self.recent.append((sequence, first, count))
                return True
        kept = memoryview(bytes(data))
        self.parked.append(Change(sequence, first, count, kept, tuple(checksums)))
        return False

    def zero(self, sequence: int, first: int, count: int, keep: bool) -> bool:
        """Apply a ZERO; False: it is parked. One that overtakes parked changes is not in order."""
        self._newest = sequence
        if not any(other.overlaps(first, count) for other in self.parked):
            try:
                self._replica.zero(first, count, keep_allocated=keep)
            except BlockdError as error:
                if error.errno not in FULL_DISK:
                    raise
                if not self.parked:
                    self._first_parked(sequence, error)
            else:
                if self._epoch != self._service.epoch:
                    self._begin_epoch(sequence)
                self.recent.append((sequence, first, count))
                if self.parked:
                    self._service.loop.post(self.retry)
                return True
        self.parked.append(Change(sequence, first, count, keep=keep))
        return False

    def waits(self, blocks: Reach, run: Callable[[], None], holds_all: bool = False) -> bool:
        """True: `run` has to come after parked changes of these blocks, and will."""
        if any(other.overlaps(*some) for other in self.parked for some in blocks):
            self.parked.append(Waiting(run, holds_all))
            return True
        return False

    def _begin_epoch(self, sequence: int) -> None:
        """The first change of a new owner, whose sequences begin anew."""
        self._epoch = self._service.epoch
        self.recent.clear()
        self.recent_base = sequence - 1

    def applied(self, sequence: int, behind: int) -> None:
        """Everything up to `sequence` is applied, on all members up to `sequence - behind`."""
        self.position = (self._service.epoch, sequence)
        recent, base, everywhere = self.recent, self.recent_base, sequence - behind
        while recent and (recent[0][0] <= everywhere or len(recent) > RECENT_MAX):
            gone = recent.popleft()[0]
            base = gone if gone > base else base
        self.recent_base = base

    def describe(self) -> dict[str, Any]:
        """The last changes, for the next owner."""
        return {"base": self.recent_base, "changes": [list(change) for change in self.recent]}

    def _first_parked(self, sequence: int, error: BlockdError) -> None:
        if self.owner is not None:
            self.owner.full(sequence, error.errno)
        if not self._retrying:
            self._retrying = True
            self._service.loop.later(RETRY_SECONDS, self._retry_due)

    def _retry_due(self) -> None:
        self._retrying = False
        self.retry()
        if self.parked:
            self._retrying = True
            self._service.loop.later(RETRY_SECONDS, self._retry_due)

    def retry(self) -> None:
        """Apply parked changes as long as there is space for them."""
        done = 0
        while self.parked:
            change = self.parked[0]
            if isinstance(change, Waiting):
                self.parked.popleft()
                change.run()
                continue
            try:
                if change.data is None:
                    self._replica.zero(change.first, change.count, keep_allocated=change.keep)
                else:
                    self._replica.write(change.first, change.count, change.data, change.checksums)
            except BlockdError as error:
                if error.errno not in FULL_DISK:
                    self.parked.clear()
                    self._service.refused()
                    if self.owner is not None:
                        self.owner.refused(change.sequence, error)
                break
            self.parked.popleft()
            self.recent.append((change.sequence, change.first, change.count))
            done = change.sequence
        if done:
            if not self.parked:
                done = self._newest  # what overtook is in order now
            self.position = (self._service.epoch, done)
            if self.owner is not None:
                self.owner.room(done)
