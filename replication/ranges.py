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


class RangeLocks:
    """Held and awaited block ranges of one volume."""

    __slots__ = ("held", "waiting")

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.waiting: list[tuple[int, int, bool, Callable[[], None]]] = []

    def blocks(self, first: int, stop: int) -> bool:
        """Must an operation on [first, stop) wait? Callers skip this while `held` is empty."""
        return any(first < end and start < stop for start, end in self.held) or any(
            first < end and start < stop for start, end, _, _ in self.waiting
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
        """Free a held range and run who waited for it."""
        self.held.remove((first, stop))
        waiting, self.waiting = self.waiting, []
        ready: list[Callable[[], None]] = []
        for entry in waiting:
            start, end, hold, run = entry
            if self.blocks(start, end):
                self.waiting.append(entry)
                continue
            if hold:
                self.held.append((start, end))
                ready.append(run)
            else:
                # Runs at once so that later waiters on the same blocks stay behind it.
                ready.append(run)
        for run in ready:
            run()
