"""The copying of a rebuild: several jobs under way, read from all sources in turn.

A job is some blocks of one region of a logical layer. Where the member may have them already,
source and member hash them first, and only runs that differ are copied. Blocks of the live head are
held by the range lock until their copy stands in the member's queue: what is written afterwards
comes behind it. A source that cannot read is passed over; if none can, and the member does not have
what the damaged block was (rescue.py), the rebuild fails.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from protocol import replica as wire
from protocol.errors import BlockdError, NotFoundError, PeerError, StateError, StorageError
from protocol.units import BLOCK_BYTES
from replication.plan import Job
from replication.rescue import Rescue

if TYPE_CHECKING:
    from replication.link import Link
    from replication.rebuild import Rebuild

WINDOW = 4  # jobs under way: some are read while others are written; a few MiB of memory
GENTLE_BLOCKS = 16  # of a job while there are users, one at a time: they wait behind 64 KiB
DIGEST_BYTES = 16
BAD_DIGEST = b"\xff" * DIGEST_BYTES


class CopyJobs:
    """All jobs of one attempt of a rebuild."""

    def __init__(
        self, rebuild: Rebuild, attempt: int, jobs: Iterator[Job], finished: Callable[[], None]
    ) -> None:
        self.rebuild = rebuild
        self.attempt = attempt
        self.engine = rebuild.engine
        self._jobs = jobs
        self._parts: deque[Job] = deque()  # of a job that is done in parts
        self._finished = finished
        self._under_way = 0
        self._turn = 0
        self._waiting = False  # for the pace to let us go on
        self._over = False

    @property
    def over(self) -> bool:
        """The attempt ended."""
        return self._over or not self.rebuild.is_current(self.attempt)

    def pump(self) -> None:
        """Keep WINDOW jobs under way, one while there are users; after the last, `finished()`."""
        while not self.over and self._under_way < self._window() and not self._waiting:
            seconds = self.rebuild.pace.wait_seconds()
            if seconds > 0:
                self._waiting = True
                self.rebuild.pace.later(seconds, self._go_on)
                return
            if not self._next():
                return

    def _window(self) -> int:
        return 1 if self.rebuild.pace.has_users else WINDOW

    def _next_job(self) -> Job | None:
        if self._parts:
            return self._parts.popleft()
        job = next(self._jobs, None)
        if job is None or not self.rebuild.pace.has_users:
            return job
        layer_id, parent_id, first, count, compare = job
        for start in range(first, first + count, GENTLE_BLOCKS):
            part = min(GENTLE_BLOCKS, first + count - start)
            self._parts.append((layer_id, parent_id, start, part, compare))
        return self._parts.popleft()

    def _next(self) -> bool:
        """Start the next job; False: there is none."""
        job = self._next_job()
        if job is None:
            if not self._under_way:
                self._over = True
                self._finished()
            return False
        self._under_way += 1
        _Copy(self, job).start()
        return True

    def _go_on(self) -> None:
        """A pause is over: one job has waited for it, whatever the pace says by now."""
        self._waiting = False
        if not self.over and self._under_way < self._window():
            self._next()
        self.pump()

    def ended(self, count: int) -> None:
        """One job about `count` blocks ended."""
        self._under_way -= 1
        self.rebuild.compared_bytes += count * BLOCK_BYTES
        self.pump()

    def source(self, bad: list[Link]) -> Link | None:
        """The next member to read from; None if all of them have failed this job."""
        sources = [link for link in self.engine.readers if link not in bad]
        if not sources:
            return None
        self._turn += 1
        return sources[self._turn % len(sources)]


class _Copy:
    """One job. Each try has a number; what an earlier try asked for is ignored when answered."""

    def __init__(self, jobs: CopyJobs, job: Job) -> None:
        self._jobs = jobs
        self._engine = jobs.engine
        self._link = jobs.rebuild.link
        self._layer_id, self._parent_id, self._first, self._count, self._compare = job
        self._bad: list[Link] = []
        self._rescued = False  # it was tried
        self._try = 0
        self._locked = False

    def start(self) -> None:
        """Hold the blocks if they can be written, then compare or copy."""
        plan = self._jobs.rebuild.plan
        assert plan is not None
        if self._layer_id == plan.head_id:
            self._engine.locks.acquire(self._first, self._first + self._count, self._hold)
        else:
            self._run()

    def _hold(self) -> None:
        self._locked = True
        if self._jobs.over:
            self._release()
        else:
            self._run()

    def _release(self) -> None:
        if self._locked:
            self._locked = False
            self._engine.locks.release(self._first, self._first + self._count)

    def _run(self) -> None:
        self._try += 1
        source = self._jobs.source(self._bad)
        if source is None:
            self._rescue()
        elif self._compare:
            self._hash(source)
        else:
            self._copy(source, [(self._first, self._count)])

    def _rescue(self) -> None:
        """All sources have damaged blocks here: once, mend one from the member, and begin anew."""
        engine, plan, this_try = self._engine, self._jobs.rebuild.plan, self._try
        source = next((link for link in self._bad if link in engine.readers), None)
        if source is None or self._rescued or plan is None:
            self._member_failed(PeerError("no replica in sync can read what is to be copied"))
            return
        self._rescued = True

        def done(error: BlockdError | None) -> None:
            if self._jobs.over:
                self._release()
            elif this_try != self._try:
                return
            elif error is not None:
                self._member_failed(error)
            else:
                self._bad.remove(source)
                self._run()

        place = (self._layer_id, self._parent_id, self._first, self._count)
        Rescue(engine, source, self._link, place, self._layer_id == plan.head_id, done)

    def _ask(
        self,
        link: Link,
        operation: int,
        run: tuple[int, int],
        then: Callable[[memoryview], None],
    ) -> None:
        """One request about some of the blocks, to the source or to the member."""
        this_try = self._try
        first, count = run

        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if self._jobs.over:
                self._release()
            elif this_try != self._try:
                return
            elif error is None and payload is not None:
                then(payload)
            elif link is self._link:
                self._member_failed(error or PeerError("an answer without blocks"))
            else:
                self._source_failed(link, error or PeerError("an answer without blocks"))

        place = wire.place(self._parent_id, first)
        layer_id = self._layer_id
        self._engine.call(link, operation, reply, flags=count, offset=place, argument=layer_id)

    def _hash(self, source: Link) -> None:
        digests: dict[Link, bytes] = {}

        def answered(link: Link, payload: memoryview) -> None:
            if len(payload) != self._count * DIGEST_BYTES:
                raise wire.WireError(f"{len(payload)} bytes of digests of {self._count} blocks")
            digests[link] = bytes(payload)
            if len(digests) == 2:
                self._compared(source, digests[source], digests[self._link])

        whole = (self._first, self._count)
        for link in (source, self._link):
            self._ask(link, wire.LAYER_HASH, whole, partial(answered, link))

    def _compared(self, source: Link, theirs: bytes, ours: bytes) -> None:
        if theirs == ours and BAD_DIGEST not in theirs:
            self._end()
            return
        runs = differing_runs(theirs, ours, self._first)
        if runs is None:
            self._source_failed(source, PeerError("a block is damaged there"))
        elif runs:
            self._copy(source, runs)
        else:
            self._end()

    def _copy(self, source: Link, runs: list[tuple[int, int]]) -> None:
        unread, unwritten, this_try = len(runs), len(runs), self._try

        def read(run: tuple[int, int], payload: memoryview) -> None:
            nonlocal unread
            first, count = run
            copy = memoryview(bytes(payload))  # outlives the source's receive buffer
            self._engine.call(
                self._link,
                wire.LAYER_WRITE,
                written,
                flags=count,
                length=wire.map_checksum(copy, count),
                offset=wire.place(self._parent_id, first),
                argument=self._layer_id,
                payload=[copy],
            )
            self._jobs.rebuild.moved(len(copy) - 4 * count)
            unread -= 1
            if not unread:
                self._release()  # what is written from now on comes behind the copies

        def written(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            nonlocal unwritten
            if self._jobs.over:
                self._release()
            elif this_try != self._try:
                return
            elif isinstance(error, StorageError) and error.errno == errno.EIO:
                self._refused(source)
            elif error is not None:
                self._member_failed(error)
            else:
                unwritten -= 1
                if not unwritten:
                    self._end()

        for run in runs:
            self._ask(source, wire.LAYER_READ, run, partial(read, run))

    def _end(self) -> None:
        self._release()
        self._jobs.ended(self._count)

    def _source_failed(self, source: Link, error: BlockdError) -> None:
        """Compare with another member; if the tree has changed, begin the whole again."""
        if isinstance(error, (StateError, NotFoundError)):
            self._release()
            self._jobs.rebuild.start_over(self._jobs.attempt, error)
            return
        self._pass_over(source)
        self._run()

    def _refused(self, source: Link) -> None:
        """The member found that a block does not match its checksum: another source, compared."""
        self._try += 1
        self._pass_over(source)
        self._release()
        self.start()

    def _pass_over(self, source: Link) -> None:
        source.errors += 1
        self._bad.append(source)
        self._compare = True

    def _member_failed(self, error: BlockdError) -> None:
        self._release()
        self._jobs.rebuild.failed(self._jobs.attempt, error)


def differing_runs(theirs: bytes, ours: bytes, first: int) -> list[tuple[int, int]] | None:
    """(first block, count) of the runs of blocks whose digests differ; None if theirs is bad."""
    runs: list[tuple[int, int]] = []
    for number in range(len(theirs) // DIGEST_BYTES):
        at = number * DIGEST_BYTES
        digest = theirs[at : at + DIGEST_BYTES]
        if digest == BAD_DIGEST:
            return None
        if digest == ours[at : at + DIGEST_BYTES]:
            continue
        if runs and sum(runs[-1]) == first + number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((first + number, 1))
    return runs
