"""Flushes of one replica: begun where they are asked for, done one at a time in a thread, shared.

A flush is begun when it is asked for, so it covers what was applied before that and nothing else:
which zones are the same on all members depends on it (`stable`). While one runs, others wait; then
the last of them is done for all, because it covers what those before it cover.

If the process dies in between, nobody was answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from blockd.daemons import process
from blockd.loop import Loop
from protocol.errors import BlockdError, StorageError
from snapshots.flush import FlushJob
from snapshots.replica import Replica

BUSY_SECONDS = 2.0  # between signs of life during a flush; far below the peer's limit for silence

Done = Callable[[BlockdError | None], None]


class _Run:
    """One flush in a thread: the job that is done, and all that it is done for."""

    def __init__(self, calls: list[tuple[FlushJob, Done, int]]) -> None:
        self.calls = calls
        self.job = calls[-1][0]
        self.failure: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self.job.run()
        except BaseException as error:  # judged in the loop
            self.failure = error
        finally:
            self.ended.set()


class Flushing:
    """The flushes of one replica, in the loop that owns it."""

    def __init__(self, loop: Loop, replica: Replica) -> None:
        self.on_busy: list[Callable[[], None]] = []
        self.count = 0
        self._loop = loop
        self._replica = replica
        self._waiting: list[tuple[FlushJob, Done, int]] = []
        self._running: _Run | None = None
        self._numbers: dict[int, int] = {}  # of flushes not known to be stable, by sequence

    @property
    def running(self) -> bool:
        """Is a flush under way?"""
        return self._running is not None

    def flush(self, done: Done, sequence: int = 0) -> None:
        """Make everything applied so far durable, then `done`.

        `sequence` is that of the owner's FLUSH, by which `stable` knows it again.
        """
        self.count += 1
        try:
            job = self._replica.flush_begin()
        except BlockdError as error:
            done(error)
            return
        self._waiting.append((job, done, sequence))
        if self._running is None:
            self._next()

    def _next(self) -> None:
        calls, self._waiting = self._waiting, []
        run = self._running = _Run(calls)
        self._loop.later(BUSY_SECONDS, lambda: self._beat(run))
        self._loop.in_thread(run.run, lambda result, failure: self._end(run))

    def _end(self, run: _Run) -> None:
        if self._running is not run:
            return  # somebody waited for it
        self._running = None
        error = as_storage_error(run.failure) if run.failure is not None else None
        if error is not None:
            process.log(str(error))
        for job, _, sequence in run.calls:
            if job is not run.job:
                job.covered_by(run.job)
            self._replica.flush_end(job)
            if error is None and sequence:
                self._numbers[sequence] = job.sequence
        for _, done, _ in run.calls:
            done(error)
        if self._waiting and self._running is None:
            self._next()

    def _beat(self, run: _Run) -> None:
        """A flush may take minutes on a slow disk: say that we live, and not more often."""
        if self._running is run:
            for tell in list(self.on_busy):
                tell()
            self._loop.later(BUSY_SECONDS, lambda: self._beat(run))

    def stable(self, sequence: int, config_seq: int) -> bool:
        """The owner's FLUSH with this sequence succeeded on every member of a configuration.

        True if that may have made zones clean.
        """
        known = [number for number in self._numbers if number <= sequence]
        flushes = [self._numbers.pop(number) for number in known]
        if flushes:
            self._replica.stable(max(flushes), config_seq)
        return bool(flushes)

    def new_owner(self) -> None:
        """Sequences of the older owner mean nothing any more."""
        self._numbers.clear()

    def wait(self) -> None:
        """Block until no flush runs; for the rare request that excludes one."""
        while (run := self._running) is not None:
            run.ended.wait()
            self._end(run)

    def close(self) -> None:
        """End what runs; nobody is answered any more."""
        for job, _, _ in self._waiting:
            self._replica.flush_end(job)
        self._waiting.clear()
        self.wait()


def as_storage_error(failure: BaseException) -> BlockdError:
    """What a worker thread raised, as an error that can be answered; bugs are raised again."""
    if isinstance(failure, BlockdError):
        return failure
    if isinstance(failure, OSError):
        return StorageError(f"the disk failed: {failure}", errno=failure.errno)
    raise failure
