"""The range lock of a volume: who may write where while a multi-step operation is under way.

Plain writes need no lock of their own: they enter every member's link in one order, links are
first in, first out, and replicas apply in that order, so overlapping writes end the same on all
members. A lock is held by what reads first and writes later: completing a sub-block write to
whole blocks, and copying a region to a member that is being rebuilt. While such a range is held,
overlapping writes and trims wait here, in order.

Invariants: held ranges do not overlap; a waiter runs only when no held range and no earlier waiter
overlaps it. Ranges are half-open block numbers.
"""

from __future__ import annotations

from collections.abc import Callable

Waiter = tuple[int, int, bool, Callable[[], None]]
"""first block, stop block, does it hold the range?, what to call"""


class RangeLocks:
    """Held and awaited block ranges of one volume."""

    __slots__ = ("_releasing", "held", "waiting")

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.waiting: list[Waiter] = []
        self._releasing = False

    def blocks(self, first: int, stop: int) -> bool:
        """Must an operation on [first, stop) wait? Callers skip this while `held` is empty."""
        return self._blocked(first, stop, len(self.waiting))

    def _blocked(self, first: int, stop: int, earlier: int) -> bool:
        return any(first < end and start < stop for start, end in self.held) or any(
            first < end and start < stop for start, end, _, _ in self.waiting[:earlier]
        )

    def acquire(self, first: int, stop: int, run: Callable[[], None]) -> None:
        """Hold [first, stop) and call `run`, now or when it is free; ended by `release`."""
        if self.blocks(first, stop):
            self.waiting.append((first, stop, True, run))
        else:
            self.held.append((first, stop))
            run()

    def wait(self, first: int, stop: int, run: Callable[[], None]) -> None:
        """Call `run` once nothing held or awaited before it overlaps [first, stop)."""
        self.waiting.append((first, stop, False, run))

    def release(self, first: int, stop: int) -> None:
        """Free a held range and run who waited for it, in order."""
        self.held.remove((first, stop))
        if self._releasing:
            return  # called by a waiter: the loop below goes on from the front
        self._releasing = True
        try:
            while (waiter := self._take_free()) is not None:
                waiter()
        finally:
            self._releasing = False

    def _take_free(self) -> Callable[[], None] | None:
        for index, (first, stop, hold, run) in enumerate(self.waiting):
            if not self._blocked(first, stop, index):
                del self.waiting[index]
                if hold:
                    self.held.append((first, stop))
                return run
        return None
