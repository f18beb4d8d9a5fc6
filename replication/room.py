"""What waits while the disk of a member is full: nothing fails, and everything goes on by itself.

A member in sync that finds no space says FULL and keeps what it cannot apply. Until it says APPLIED
again, no new writes are sent: they wait here, and above WAITING_BYTES_MAX clients are not read.
Trims and everything else go on, because they are what makes room; a trim that overtook writes on
a full member is answered as soon as every target has done it.

A member that is being rebuilt, or lacks changes of a dead owner, and has no space is given up: the
volume does not wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from replication.authority import IN_SYNC

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

WAITING_BYTES_MAX = 64 << 20  # data of waiting writes; what a kernel client has under way at most


class Room:
    """The full members of one engine, and what waits for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.full: dict[Link, int] = {}  # to the sequence of the first change that waits
        self.waiting_bytes = 0
        self.on_room: Callable[[], None] = lambda: None
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._early: dict[int, set[Link]] = {}  # changes that some members have done out of order

    def is_full(self, link: Link, sequence: int) -> None:
        """A member has no space for the change `sequence`."""
        if link.state != IN_SYNC or link.behind:
            self._engine.fail(link, "its disk is full")
        elif link.connected:
            self.full[link] = sequence
            self._engine.paused = True

    def wait(self, run: Callable[[], None], size_bytes: int) -> None:
        """Run a write when there is room."""
        self._waiting.append((run, size_bytes))
        self.waiting_bytes += size_bytes

    def done_early(self, link: Link, sequence: int) -> None:
        """A member did a change although earlier ones wait."""
        self._early.setdefault(sequence, set()).add(link)

    def applied(self, link: Link) -> None:
        """A full member has applied something after all."""
        if link in self.full and link.applied >= self.full[link]:
            del self.full[link]
            self._look()

    def members_changed(self) -> None:
        """Members that are no targets any more hold nothing up."""
        targets = self._engine.targets
        self.full = {link: at for link, at in self.full.items() if link in targets}
        self._look()

    def _look(self) -> None:
        engine = self._engine
        if not engine.paused:
            return
        engine.paused = bool(self.full)
        if not engine.paused:
            self._early.clear()
        while self._waiting and not engine.paused:
            run, size_bytes = self._waiting.popleft()
            self.waiting_bytes -= size_bytes
            run()
        if not engine.paused:
            self.on_room()

    def answer_early(self) -> None:
        """Answer changes that every target has done, past those that wait."""
        engine = self._engine
        ready = [
            entry
            for entry in engine.pending
            if entry[0] in self._early and self._is_done(entry[0], self._early[entry[0]])
        ]
        for entry in ready:
            engine.pending.remove(entry)
            del self._early[entry[0]]
            engine.answer(entry)

    def _is_done(self, sequence: int, early: set[Link]) -> bool:
        return all(link.applied >= sequence or link in early for link in self._engine.targets)
