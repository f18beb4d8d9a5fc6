"""A scripted life of a replica, recorded: what its daemon does with it, and what it must hold.

Writes, zeroing, snapshots, deleting and folding them, reverts, flushes whose threads let writes in
between, STABLE as the volume daemon says it, maintenance, kills of the process, power cuts.
The order is random but for the seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from unittest import mock

from protocol.checksum import block_checksums
from snapshots.flush import FlushJob
from snapshots.replica import Replica
from snapshots.store import Store
from tests.powercut.expected import ZERO, Expected, Flush, Revert, Snapshot
from tests.powercut.found import read_all
from tests.powercut.recorder import Recorder
from tests.powercut.states import after_cut, make, random_choice
from tests.snapshots.model import BLOCKS, RANGES, REGION, SIZE_BYTES, fill, kill

REGION_COUNT = -(-(SIZE_BYTES // 4096) // REGION)
SNAPSHOTS_MAX = 5
RUN_MAX = 6
KINDS = {
    "change": 40,
    "flush": 14,
    "two_flushes": 3,
    "maintain": 16,
    "seal": 6,
    "remove": 4,
    "revert": 2,
    "restart": 2,
    "cut": 3,
    "note": 2,
}


class History:
    """One replica, its recorder, its model."""

    def __init__(self, directory: Path, random: Random) -> None:
        self.path = str(directory / "replica")
        self.random = random
        Replica.create(self.path, size_bytes=SIZE_BYTES, replica_uuid="r", head_id=1)
        self.recorder = Recorder(self.path, REGION_COUNT)
        self.expected = Expected(tuple(BLOCKS))
        self.number = 0
        self.next_layer = 2
        self.config = 1
        self.interrupting = False
        self._jobs: dict[FlushJob, Flush] = {}
        self.steps: list[tuple[int, str]] = []  # time, what began then
        self.recorder.begin_segment()

    @property
    def now(self) -> int:
        self.recorder.scan()
        return self.recorder.time

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The replica is open and everything it does is recorded."""
        begin, run = Store.flush_begin, FlushJob.run

        def flush_begin(store: Store) -> FlushJob:
            if store.path != self.path:
                return begin(store)
            flush = Flush(self.now)
            self.expected.flushes.append(flush)
            job = begin(store)
            self._jobs[job] = flush
            return job

        def run_job(job: FlushJob) -> None:
            run(job)
            if job in self._jobs:
                self.expected.flush_ended(self._jobs[job], self.now)

        with (
            self.recorder.installed(),
            mock.patch.object(Store, "flush_begin", flush_begin),
            mock.patch.object(FlushJob, "run", run_job),
        ):
            self.recorder.before_sync = self._in_between
            self._open()
            yield
            kill(self.replica)
            self.recorder.scan()

    def _open(self) -> None:
        self.replica = Replica.open(self.path)
        self.replica.shared = True

    def _in_between(self) -> None:
        """The event loop goes on while a flush waits for the disk in its thread."""
        if self.interrupting and self.random.random() < 0.5:
            self.interrupting = False
            self.change()
            self.interrupting = True

    # ---- steps ----------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """That many random steps."""
        for _ in range(steps):
            self.do(self.random.choices(list(KINDS), list(KINDS.values()))[0])

    def do(self, kind: str) -> None:
        self.steps.append((self.now, kind))
        getattr(self, kind)()

    def change(self, replicas: Iterable[Replica] | None = None) -> None:
        """A write or a zeroing of a few blocks, on this replica or on those given."""
        random = self.random
        replicas = list(replicas or (self.replica,))
        mine = self.replica in replicas
        first, size = random.choice(RANGES)
        start = random.randrange(size)
        count = random.randint(1, min(RUN_MAX, size - start))
        first += start
        if random.random() < 0.3:
            if mine:
                self.expected.change(self.now + 1, dict.fromkeys(range(first, first + count), ZERO))
            keep = random.random() < 0.3
            for replica in replicas:
                replica.zero(first, count, keep_allocated=keep)
            self.expected.applied(self.now)
            return
        numbers = []
        for _ in range(count):
            self.number += 1
            numbers.append(0 if random.random() < 0.1 else self.number)
        contents = [fill(number) for number in numbers]
        data = memoryview(b"".join(contents))
        if mine:
            self.expected.change(
                self.now + 1, {first + at: content for at, content in enumerate(contents)}
            )
        for replica in replicas:
            replica.write(first, count, data, block_checksums(data))
        self.expected.applied(self.now)

    def flush(self) -> None:
        """As flushing.py does it; perhaps the owner says afterwards that all members have it."""
        job = self.replica.flush_begin()
        self._run(job)
        self.replica.flush_end(job)
        self._stable(job)

    def two_flushes(self) -> None:
        """The second one is done for both."""
        first = self.replica.flush_begin()
        self.change()
        second = self.replica.flush_begin()
        self._run(second)
        first.covered_by(second)
        self.replica.flush_end(first)
        self.replica.flush_end(second)
        self.expected.flush_ended(self._jobs[first], self.now)
        self._stable(first if self.random.random() < 0.5 else second)

    def _run(self, job: FlushJob) -> None:
        self.interrupting = True
        try:
            job.run()
        finally:
            self.interrupting = False

    def _stable(self, job: FlushJob) -> None:
        if self.random.random() < 0.7:
            self.replica.stable(job.sequence, self.config)
            self._jobs[job].stable = self.now

    def maintain(self) -> None:
        """As replica_service.py does it."""
        for _ in range(self.random.randrange(1, 5)):
            more = self.replica.maintain(self.random.choice((3, 64)), inline_flush=False)
            if self.replica.flush_wanted:
                self.flush()
            elif not more:
                return

    def seal(self) -> None:
        if len(self._present()) >= SNAPSHOTS_MAX:
            return
        head = self.replica.metadata.head_id
        snapshot = Snapshot(dict(self.expected.live), self.now)
        self.expected.snapshots[head] = snapshot
        self.replica.seal(self.next_layer, f"s{head}", "2026-01-01T00:00:00Z", {})
        self.next_layer += 1
        snapshot.sealed_end = self.now

    def _present(self) -> list[int]:
        tree = self.replica.tree()
        return [info.id for info in tree if info.name and not info.removed]

    def remove(self) -> None:
        if not (present := self._present()):
            return
        snapshot = self.expected.snapshots[layer_id := self.random.choice(present)]
        snapshot.removing = self.now + 1
        self.replica.remove(layer_id)
        snapshot.removed = self.now

    def revert(self) -> None:
        if not (present := self._present()):
            return
        expected, layer_id = self.expected, self.random.choice(present)
        self.replica.settle()  # what `revert` does first: before that there is nothing to see
        revert = Revert(self.next_layer, self.now + 1)
        expected.reverts.append(revert)
        content = expected.snapshots[layer_id].content
        expected.change(self.now + 1, {b: content.get(b, ZERO) for b in expected.blocks})
        self.replica.revert(layer_id, self.next_layer)
        self.next_layer += 1
        revert.ended = self.now
        expected.applied(revert.ended)
        expected.flushes.append(Flush(revert.ended, revert.ended))

    def note(self) -> None:
        """A new member configuration."""
        self.config += 1
        self.replica.note_config(self.config)

    def restart(self) -> None:
        """kill -9 and a new process on the same boot."""
        kill(self.replica)
        self._open()

    def cut(self) -> None:
        """A power cut in the life of the replica; the next process opens what it left."""
        kill(self.replica)
        time = self.now
        unstable = self.expected.unstable_zones(time)
        self.cut_and_open(time)
        self.expected.cut(time, self.now, read_all(self.replica), self._present(), unstable)

    def cut_and_open(self, time: int) -> None:
        """Power is gone at `time`, which is now, and comes back."""
        state = after_cut(self.recorder, time, random_choice(self.random))
        with self.recorder.paused():
            make(state, self.path, self.path)
        self.recorder.boot += 1
        self.recorder.begin_segment()
        self._open()
