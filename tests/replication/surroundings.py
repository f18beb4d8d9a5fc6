"""Time, threads and the authority, in memory: nothing happens before the test says so."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from protocol.errors import ConflictError, NotFoundError, StorageError
from replication.authority import Record


class Clock:
    """Time, timers and threads, all waiting for the test."""

    def __init__(self) -> None:
        self.now_seconds = 0.0
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = []
        self.posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def now(self) -> float:
        return self.now_seconds

    def in_thread(
        self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        self.jobs.append((work, done))

    def later(self, delay_seconds: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._timers, (self.now_seconds + delay_seconds, self._count, call))

    def run_job(self, index: int) -> None:
        """A thread does its work; its answer is posted to the loop."""
        work, done = self.jobs.pop(index)
        try:
            result, failure = work(), None
        except BaseException as error:
            result, failure = None, error
        self.posted.append(lambda: done(result, failure))

    def advance(self, seconds: float) -> None:
        """Let time pass and run what is due."""
        self.now_seconds += seconds
        while self._timers and self._timers[0][0] <= self.now_seconds:
            heapq.heappop(self._timers)[2]()


class MemoryAuthority:
    """Records in a dictionary. `away`: it cannot be reached; `lose_answers`: that many swaps are
    done, but the caller never hears of it."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.history: list[Record] = []
        self.away = False
        self.lose_answers = 0

    def _reach(self) -> None:
        if self.away:
            raise StorageError("the authority is away")

    def load(self, volume_uuid: str) -> Record | None:
        self._reach()
        return self.records.get(volume_uuid)

    def find(self, volume_name: str) -> Record | None:
        self._reach()
        return next((r for r in self.records.values() if r.volume_name == volume_name), None)

    def create(self, record: Record) -> Record:
        self._reach()
        if record.volume_uuid in self.records:
            raise ConflictError("exists")
        return self._store(replace(record, version=1))

    def swap(self, record: Record) -> Record:
        self._reach()
        old = self.records.get(record.volume_uuid)
        if old is None:
            raise NotFoundError("no record")
        if old.version != record.version:
            raise ConflictError("moved")
        stored = self._store(replace(record, version=record.version + 1))
        if self.lose_answers:
            self.lose_answers -= 1
            raise StorageError("the answer was lost")
        return stored

    def delete(self, volume_uuid: str) -> None:
        self._reach()
        self.records.pop(volume_uuid, None)

    def _store(self, record: Record) -> Record:
        self.records[record.volume_uuid] = record
        self.history.append(record)
        return record

    def edit(self, volume_uuid: str, change: Callable[[Record], Record]) -> None:
        """Somebody else changes the record."""
        record = self.records[volume_uuid]
        self._store(replace(change(record), version=record.version + 1))
