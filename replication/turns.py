"""One change of a volume's structure at a time, in the order they were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from protocol.errors import BlockdError

Done = Callable[[BlockdError | None], None]


class Turns:
    """A queue of changes; each ends by calling the `end` it was given, exactly once."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Callable[[Done], None], Done]] = deque()
        self._running = False

    @property
    def busy(self) -> bool:
        """Is a change under way?"""
        return self._running

    def take(self, work: Callable[[Done], None], done: Done) -> None:
        """Run `work(end)` when its turn comes; `done` gets what it passes to `end` or raises."""
        self._queue.append((work, done))
        if not self._running:
            self._next()

    def _next(self) -> None:
        if not self._queue:
            return
        self._running = True
        work, done = self._queue.popleft()
        try:
            work(lambda error: self._ended(done, error))
        except BlockdError as error:
            self._ended(done, error)

    def _ended(self, done: Done, error: BlockdError | None) -> None:
        self._running = False
        done(error)
        if not self._running:
            self._next()
