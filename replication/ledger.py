"""Changes of a volume's record, one after the other, off the loop.

The engine asks for a change as a function from the newest record to the next one. The ledger
applies it by compare-and-swap, repeats it on a newer record if somebody else changed something
else in between, and waits while the authority is away: everything that depends on the change
stays held meanwhile. A record with another epoch means that another volume daemon owns the
volume: the ledger calls `fenced` and does nothing more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from protocol.errors import BlockdError, ConflictError, NotFoundError, StorageError
from replication.authority import Authority, Record

RETRY_SECONDS = 1.0  # between attempts while the authority is away

Change = Callable[[Record], Record]
Done = Callable[[BlockdError | None], None]


class Clock(Protocol):
    """What the ledger needs of the loop."""

    def in_thread(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None: ...

    def later(self, delay_seconds: float, call: Callable[[], None]) -> Any: ...


class Ledger:
    """The newest record and the queue of changes to it."""

    def __init__(
        self,
        authority: Authority,
        record: Record,
        clock: Clock,
        fenced: Callable[[str], None],
    ) -> None:
        self.record = record
        self.held: str | None = None
        self.on_change: Callable[[], object] = lambda: None  # what a change let out can be sent
        self._authority = authority
        self._clock = clock
        self._fenced = fenced
        self._queue: deque[tuple[Change, Done, int]] = deque()
        self.count = 0  # changes so far; part of their stamps
        self._running = False

    @property
    def busy(self) -> bool:
        """Is a change under way?"""
        return self._running

    def change(self, change: Change, done: Done) -> None:
        """Apply `change`, then `done(None)`; `done(error)` if the change itself raised."""
        self.count += 1
        self._queue.append((change, done, self.count))
        if not self._running:
            self._next()

    def _next(self) -> None:
        self._running = bool(self._queue)
        if not self._running:
            return
        change, done, number = self._queue[0]
        try:
            # Nobody else has our epoch, so no other change has this stamp.
            stamp = f"{self.record.epoch}.{number}"
            wanted = replace(change(self.record), stamp=stamp)
        except BlockdError as error:
            self._queue.popleft()
            done(error)
            self._next()
            return
        self._clock.in_thread(lambda: self._swap(wanted), self._swapped)

    def _swap(self, wanted: Record) -> tuple[Record, bool]:
        """In a thread: (newest record, is it the wanted one?)."""
        try:
            return self._authority.swap(wanted), True
        except ConflictError:
            newest = self._authority.load(wanted.volume_uuid)
            if newest is None:
                raise NotFoundError(
                    f"volume {wanted.volume_name} was deleted by somebody else"
                ) from None
            if newest.epoch != wanted.epoch:
                raise _Fenced(
                    f"volume {wanted.volume_name} was opened by another volume daemon (epoch "
                    f"{newest.epoch}, ours is {wanted.epoch}); this one stops"
                ) from None
            # Ours after all, if it was stored and only the answer was lost.
            return newest, newest.stamp == wanted.stamp

    def _swapped(self, outcome: tuple[Record, bool] | None, error: BaseException | None) -> None:
        if isinstance(error, StorageError):
            self.held = str(error)
            self._clock.later(RETRY_SECONDS, self._next)
            return
        if isinstance(error, (_Fenced, NotFoundError)):
            self._fenced(str(error))
            return
        if error is not None or outcome is None:
            raise error or AssertionError("a swap without outcome")
        self.held = None
        self.record, stored = outcome
        if stored:
            _, done, _ = self._queue.popleft()
            done(None)
        self._next()
        self.on_change()


class _Fenced(ConflictError):
    """Another owner raised the epoch."""
