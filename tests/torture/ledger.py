"""What each block may hold: every change that was sent, when, and what became of it.

Time is a counter that every event raises. A change may be seen from when it was sent. It may not be
seen any more by a read that was sent after another, acknowledged change ended that had been sent
after the first one ended. A change that failed, or whose daemon died, may have happened or not, and
ends when that became known. What a block is found to hold when nothing is under way, it holds
from then on: nothing may bring another value back.

Every change has a number of its own; a block is filled with its number and the block's own number,
so no content fits two writes or two places. Zeros have the number 0.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK_BYTES = 4096
HISTORY_PER_BLOCK = 24  # changes told when a block is wrong
_PATTERN = struct.Struct("<QQ")


class Wrong(AssertionError):
    """The volume broke a promise."""


def content_of(block: int, number: int) -> bytes:
    """The block that a change leaves."""
    if not number:
        return bytes(BLOCK_BYTES)
    return _PATTERN.pack(number, block) * (BLOCK_BYTES // _PATTERN.size)


def number_of(block: int, content: bytes) -> int:
    """The change that left this content; -1: none could."""
    number, place = _PATTERN.unpack_from(content)
    if content == content_of(block, number) and place in (block, 0):
        return int(number)
    return -1


@dataclass(eq=False)
class Change:
    """One write or zeroing of a run of blocks."""

    what: str
    number: int
    first: int
    count: int
    sent: int
    ended: int = 0  # 0: under way
    acknowledged: bool = False

    def __str__(self) -> str:
        if not self.ended:
            state = "under way"
        else:
            state = f"{'acknowledged' if self.acknowledged else 'not acknowledged'} {self.ended}"
        blocks = f"blocks {self.first} to {self.first + self.count - 1}"
        return f"{self.what} #{self.number} of {blocks}: sent {self.sent}, {state}"


@dataclass(eq=False)
class Snapshot:
    """What a snapshot may hold, block by block; one number each once it was looked at."""

    name: str
    allowed: dict[int, frozenset[int]]
    certain: bool = False  # its creation was acknowledged
    leaving: bool = False  # its deletion was asked for


@dataclass
class Ledger:
    """All changes of one volume. Thread-safe."""

    blocks: tuple[int, ...]
    snapshots: dict[str, Snapshot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._clock = 1
        self._number = 0
        start = Change("start", 0, 0, 1 << 40, 0, 1, acknowledged=True)
        self._changes: dict[int, list[Change]] = {block: [start] for block in self.blocks}
        self._told: dict[int, deque[str | Change]] = {
            block: deque(maxlen=HISTORY_PER_BLOCK) for block in self.blocks
        }
        self._open: set[Change] = set()

    def now(self) -> int:
        """A moment."""
        with self._lock:
            self._clock += 1
            return self._clock

    def begin(self, what: str, first: int, count: int, *, zeros: bool) -> Change:
        """A change is about to be sent."""
        with self._lock:
            self._clock += 1
            if not zeros:
                self._number += 1
            change = Change(what, 0 if zeros else self._number, first, count, self._clock)
            self._open.add(change)
            for block in range(first, first + count):
                self._changes[block].append(change)
                self._told[block].append(change)
            return change

    def end(self, change: Change, *, acknowledged: bool) -> None:
        """It was answered, or never will be. An answer may be read after the daemon died."""
        with self._lock:
            self._clock += 1
            self._open.discard(change)
            change.ended = change.ended or self._clock
            change.acknowledged = change.acknowledged or acknowledged

    def cut(self) -> None:
        """The daemon is dead: what is under way will not happen from now on."""
        with self._lock:
            self._clock += 1
            for change in self._open:
                change.ended = self._clock
            self._open.clear()

    def allowed(self, block: int, since: int) -> frozenset[int]:
        """What a read sent at `since` and answered now may return."""
        with self._lock:
            return self._allowed(block, since)

    def _allowed(self, block: int, since: int) -> frozenset[int]:
        changes = self._changes[block]
        newest = max(c.sent for c in changes if c.acknowledged and c.ended <= since)
        return frozenset(c.number for c in changes if not c.ended or c.ended >= newest)

    def check_read(self, first: int, content: bytes, since: int) -> None:
        """Every block of an answer must be one that was possible."""
        for at in range(0, len(content), BLOCK_BYTES):
            block = first + at // BLOCK_BYTES
            self._check(block, content[at : at + BLOCK_BYTES], self.allowed(block, since), "")

    def settle(self, first: int, content: bytes) -> None:
        """Nothing is under way: the blocks hold something possible, and that only from now on."""
        since = self.now()
        for at in range(0, len(content), BLOCK_BYTES):
            block = first + at // BLOCK_BYTES
            number = self._check(
                block, content[at : at + BLOCK_BYTES], self.allowed(block, since), ""
            )
            with self._lock:
                changes = self._changes[block]
                seen = [change for change in changes if change.number == number][-1]
                if len(changes) > 1 or not seen.acknowledged:
                    self._told[block].append(f"seen to be #{number} at {since}")
                kept = Change(seen.what, number, block, 1, seen.sent, since, acknowledged=True)
                self._changes[block] = [kept]

    def _check(self, block: int, content: bytes, allowed: frozenset[int], where: str) -> int:
        number = number_of(block, content)
        if number not in allowed:
            found = f"#{number}" if number >= 0 else f"no change's content: {content[:48].hex()}..."
            raise Wrong(
                f"block {block}{where} holds {found}, allowed {sorted(allowed)}; its history:\n  "
                + "\n  ".join(map(str, self._told[block]))
            )
        return number

    # Snapshots

    def snapshot_asked(self, name: str) -> int:
        """A snapshot is about to be asked for."""
        return self.now()

    def snapshot_answered(self, name: str, since: int, *, certain: bool) -> None:
        """It was made, or may have been; what it holds was possible at some moment in between."""
        with self._lock:
            allowed = {block: self._allowed(block, since) for block in self.blocks}
            self.snapshots[name] = Snapshot(name, allowed, certain)

    def snapshots_are(self, names: Iterable[str]) -> None:
        """Nothing is under way and these are there."""
        there = set(names)
        for name, snapshot in list(self.snapshots.items()):
            if name not in there:
                if snapshot.certain and not snapshot.leaving:
                    raise Wrong(f"snapshot {name} is lost; there are {sorted(there)}")
                del self.snapshots[name]
            else:
                snapshot.certain, snapshot.leaving = True, False
        unknown = there - set(self.snapshots)
        if unknown:
            raise Wrong(f"snapshots {sorted(unknown)} were never asked for, or were deleted")

    def settle_snapshot(self, name: str, first: int, content: bytes) -> None:
        """Blocks of a snapshot hold something possible, and that only from now on."""
        allowed = self.snapshots[name].allowed
        for at in range(0, len(content), BLOCK_BYTES):
            block = first + at // BLOCK_BYTES
            number = self._check(
                block, content[at : at + BLOCK_BYTES], allowed[block], f" of snapshot {name}"
            )
            allowed[block] = frozenset((number,))

    def reverted(self, name: str) -> None:
        """The volume holds what the snapshot holds; it was looked at before."""
        with self._lock:
            self._clock += 1
            for block, numbers in self.snapshots[name].allowed.items():
                (number,) = numbers
                change = Change(
                    f"revert to {name}", number, block, 1, self._clock, self._clock, True
                )
                self._changes[block] = [change]
                self._told[block].append(change)
