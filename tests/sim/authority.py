"""The authority: records in memory behind a network that delays, fails and loses answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from protocol.errors import ConflictError, NotFoundError, StorageError
from replication.authority import Record
from tests.sim.kernel import Kernel

T = TypeVar("T")
CALL_SECONDS = 2e-3  # mean of one call
AWAY_SECONDS = 1.0  # until a caller gives up


class SimAuthority:
    """All records, newest and older, and how it can be reached."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.records: dict[str, Record] = {}
        self.history: list[Record] = []
        self._count = 0  # of versions
        self.away = False
        self.away_for: set[str] = set()  # hosts
        self.lose_answers = 0
        self.races = 0  # somebody else changes the record just before that many swaps

    def _call(self, work: Callable[[], T]) -> T:
        kernel = self.kernel
        process = kernel.current
        assert process is not None
        kernel.sleep(kernel.random.expovariate(1.0 / CALL_SECONDS), process)
        if self.away or process.host.name in self.away_for:
            kernel.sleep(AWAY_SECONDS, process)
            raise StorageError("the authority is away")
        result = work()
        kernel.sleep(kernel.random.expovariate(1.0 / CALL_SECONDS), process)
        return result

    def load(self, volume_uuid: str) -> Record | None:
        return self._call(lambda: self.records.get(volume_uuid))

    def find(self, volume_name: str) -> Record | None:
        return self._call(
            lambda: next((r for r in self.records.values() if r.volume_name == volume_name), None)
        )

    def create(self, record: Record) -> Record:
        def work() -> Record:
            if record.volume_uuid in self.records:
                raise ConflictError("there is a record already")
            return self.store(record)

        return self._call(work)

    def swap(self, record: Record) -> Record:
        lost = False

        def work() -> Record:
            nonlocal lost
            newest = self.records.get(record.volume_uuid)
            if newest is None:
                raise NotFoundError("there is no record")
            if self.races:
                self.races -= 1
                newest = self.store(newest)
            if newest.version != record.version:
                raise ConflictError("somebody else changed the record")
            stored = self.store(record)
            if self.lose_answers:
                self.lose_answers -= 1
                lost = True
            return stored

        stored = self._call(work)
        if lost:
            raise StorageError("the answer of the authority was lost")
        return stored

    def delete(self, volume_uuid: str) -> None:
        self._call(lambda: self.records.pop(volume_uuid, None))

    def store(self, record: Record) -> Record:
        """Without any fault, at once; the version means nothing but that it is another one."""
        self._count += 1
        record = replace(record, version=self._count)
        self.records[record.volume_uuid] = record
        self.history.append(record)
        states = " ".join(f"{uuid}={m.state}" for uuid, m in record.members.items())
        self.kernel.log(
            "authority",
            f"version {record.version} epoch {record.epoch} config {record.config_seq} "
            f"{states} head {record.head_id} clean {record.clean}",
        )
        return record
