"""Verifying a volume: every block of every layer on every member in sync, while it is in use.

Layer by layer, JOB_BLOCKS at a time, all members hash the same blocks (of the live head: under the
range lock); a member whose data does not match its checksum is repaired from another one
(repair.py) and asked again. Blocks that are sound on their members but not the same are an error
that nothing explains: a member that differs from most others is put OUT and compared in all
zones, which makes it equal; if several do, only the one that differs most.

Snapshots may come and go meanwhile: the tree is listed again until no layer is left that was not
verified. It writes nothing by itself; if this process dies it has to be begun again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError, ConflictError, NotFoundError, PeerError, StateError
from protocol.trees import Tree, logical_tree
from protocol.units import BLOCKS_PER_REGION
from replication.authority import IN_SYNC, Record
from replication.copyjobs import BAD_DIGEST, DIGEST_BYTES
from replication.pace import Pace
from replication.plan import JOB_BLOCKS, job_starts
from replication.walks import Answered, Failed, Question, ask, ask_regions

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

AGAIN_SECONDS = 0.1
ATTEMPTS_MAX = 64  # listings of the tree without a layer verified in between
FROM_DISK = 1  # `length` of a LAYER_HASH: read the disk, not what is in memory


@dataclass
class Report:
    """What was found; blocks are counted once per member."""

    running: bool = True
    layers: int = 0
    checked_blocks: int = 0
    total_blocks: int = 0
    bad_blocks: int = 0
    repaired_blocks: int = 0
    differing_blocks: int = 0
    seconds: float = 0.0
    error: str | None = None
    members: dict[str, int] = field(default_factory=dict)  # bad or differing blocks by replica

    @property
    def unrepaired_blocks(self) -> int:
        """Bad blocks that no member has a good copy of."""
        return self.bad_blocks - self.repaired_blocks

    def found(self, link: Link, count: int) -> None:
        """So many blocks of a member are not as they should be."""
        self.members[link.replica_uuid] = self.members.get(link.replica_uuid, 0) + count


class Scrub:
    """One verification of a volume."""

    def __init__(self, engine: Engine, done: Callable[[Report], None], pace: Pace) -> None:
        self.engine = engine
        self.report = Report()
        self._done = done
        self._pace = pace
        self._started_at = engine.now()
        self._verified: set[tuple[int, int]] = set()
        self._attempts = 0
        self._tree: Tree = []
        self._head_id = 0
        self._regions: dict[tuple[int, int], set[int]] = {}
        self._jobs: Iterator[int] = iter(())
        self._differing: Counter[Link] = Counter()

    def start(self) -> None:
        """Begin; ConflictError if another one is running."""
        engine = self.engine
        if engine.scrub is not None:
            raise ConflictError("the volume is being verified already; wait until that has ended")
        if not engine.readers:
            raise StateError("no replica in sync is reachable to verify")
        engine.scrub = self
        engine.walks.begin(self)
        self._list()

    def abort(self, reason: str) -> None:
        """End it before its time."""
        self._end(StateError(reason))

    # ---- what there is ----------------------------------------------------------------------

    def _list(self) -> None:
        """Which layers there are now, and which of their regions have anything."""
        if not self.report.running:
            return
        self._attempts += 1
        readers = list(self.engine.readers)
        if not readers or self._attempts > ATTEMPTS_MAX:
            changes = "the layers of the volume change all the time; verify it again later"
            self._end(StateError(changes if readers else "no replica in sync is reachable"))
            return
        self.engine.walks.begin(self)

        def described(tree: dict[str, Any]) -> None:
            self._head_id = int(tree["head_id"])
            self._tree = logical_tree(tree["layers"], self._head_id)
            left = [layer for layer in self._tree if key_of(layer) not in self._verified]
            self._regions = {key_of(layer): set() for layer in left}
            questions: list[Question] = [
                (link, layer, self._regions[key_of(layer)].add)
                for layer in left
                for link in readers
            ]
            ask_regions(self._ask, questions, self._listed, self._again)

        self._ask(readers[0], {"do": "tree"}, described, self._again)

    def _listed(self) -> None:
        regions = sum(map(len, self._regions.values()))
        self.report.total_blocks = self.report.checked_blocks + regions * BLOCKS_PER_REGION
        self._next_layer()

    def _ask(self, link: Link, content: dict[str, Any], then: Answered, failed: Failed) -> None:
        ask(self.engine, link, content, self._if_running(then), failed)

    def _if_running(self, then: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(answer: Any) -> None:
            if self.report.running:
                then(answer)

        return call

    def _again(self, error: BlockdError) -> None:
        """A member was lost or the tree has changed: list what is left."""
        if not self.report.running:
            return
        if isinstance(error, PeerError | StateError | NotFoundError):
            self._pace.later(AGAIN_SECONDS, self._list)
        else:
            self._end(error)

    # ---- layer by layer ---------------------------------------------------------------------

    def _next_layer(self) -> None:
        layer = next((one for one in self._tree if key_of(one) not in self._verified), None)
        if layer is None:
            self._end(None)
            return
        regions = sorted(self._regions[key_of(layer)])
        self._jobs = chain.from_iterable(map(job_starts, regions))
        self._next_job(layer)

    def _next_job(self, layer: dict[str, Any]) -> None:
        if not self.report.running:
            return
        seconds = self._pace.wait_seconds()
        if seconds > 0:
            self._pace.later(seconds, lambda: self._job(layer))
        else:
            self._job(layer)

    def _job(self, layer: dict[str, Any]) -> None:
        job = next(self._jobs, None)
        if not self.report.running:
            return
        if job is None:
            self._verified.add(key_of(layer))
            self._attempts = 0
            self.report.layers += 1
            self._next_layer()
        else:
            _Job(self, layer, job).start()

    def job_ended(self, layer: dict[str, Any], count: int) -> None:
        """The next one."""
        self.report.checked_blocks += count
        self._next_job(layer)

    def job_failed(self, error: BlockdError) -> None:
        """Its layer is not what it was."""
        self._again(error)

    def is_live(self, layer: dict[str, Any]) -> bool:
        """Can blocks of the layer be written?"""
        return int(layer["id"]) in (self._head_id, self.engine.record.head_id)

    def views_of(self, layer: dict[str, Any]) -> list[int]:
        """The live volume (0) or snapshots in which blocks of a layer can be read."""
        found, above = [], {int(layer["id"])}
        for other in self._tree:  # parents before children
            layer_id = int(other["id"])
            if layer_id in above or int(other["parent"]) in above:
                above.add(layer_id)
                if self.is_live(other):
                    found.append(0)
                elif not other["removed"]:
                    found.append(layer_id)
                if layer_id == int(layer["id"]) and found:
                    return found
        return found

    def differ(self, links: list[Link]) -> None:
        """These members are not like the others in one block."""
        self._differing.update(links)

    # ---- the end ----------------------------------------------------------------------------

    def _end(self, error: BlockdError | None) -> None:
        report = self.report
        if not report.running:
            return
        report.running = False
        report.error = str(error) if error is not None else None
        report.seconds = self.engine.now() - self._started_at
        self.engine.scrub = None
        self.engine.walks.end(self)
        for link, _ in self._differing.most_common(1):
            if link.connected and link.state == IN_SYNC and not self.engine.suspended:
                self._compare_all(link)
        self._done(report)

    def _compare_all(self, link: Link) -> None:
        """Out, and nothing of it is known to be equal: that makes it compare all zones."""

        def change(record: Record) -> Record:
            if not any(other is not link for other in self.engine.readers):
                raise StateError(f"replica {link.replica_uuid} is the last one in sync")
            return record.as_stranger(link.replica_uuid)

        def recorded(error: BlockdError | None) -> None:
            if error is None:
                self.engine.fail(link, "it holds other data than the other replicas")

        self.engine.ledger.change(change, recorded)


class _Job:
    """The same blocks on all members."""

    def __init__(self, scrub: Scrub, layer: dict[str, Any], first: int) -> None:
        self._scrub = scrub
        self._engine = scrub.engine
        self._layer = layer
        self._first = first
        self._count = JOB_BLOCKS
        self._left = 0
        self._locked = False
        self._digests: dict[Link, bytes] = {}
        self._failure: BlockdError | None = None
        self._second = False  # after repairs
        self._found = 0  # bad blocks

    def start(self) -> None:
        """Hold the blocks if they can be written, then hash."""
        if self._scrub.is_live(self._layer):
            self._engine.locks.acquire(self._first, self._first + self._count, self._hold)
        else:
            self._hash()

    def _hold(self) -> None:
        self._locked = True
        self._hash()

    def _release(self) -> None:
        if self._locked:
            self._locked = False
            self._engine.locks.release(self._first, self._first + self._count)

    def _hash(self) -> None:
        readers = list(self._engine.readers)
        self._left, self._digests = len(readers) + 1, {}
        for link in readers:
            self._engine.call(
                link,
                wire.LAYER_HASH,
                self._reply(link),
                flags=self._count,
                length=FROM_DISK if len(readers) > 1 else 0,
                offset=wire.place(int(self._layer["parent"]), self._first),
                argument=int(self._layer["id"]),
            )
        self._one_less()

    def _reply(self, link: Link) -> Callable[[int, memoryview | None, BlockdError | None], None]:
        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is None and payload is not None:
                if len(payload) != self._count * DIGEST_BYTES:
                    raise wire.WireError(f"{len(payload)} bytes for {self._count} digests")
                self._digests[link] = bytes(payload)
            elif not isinstance(error, PeerError):
                self._failure = error
            self._one_less()

        return reply

    def _one_less(self) -> None:
        self._left -= 1
        if self._left:
            return
        self._release()
        if not self._scrub.report.running:
            return
        if self._failure is not None or not self._digests:
            self._scrub.job_failed(self._failure or PeerError("all replicas were lost"))
            return
        values = list(self._digests.values())
        bad: list[tuple[Link, int]] = []
        if values.count(values[0]) < len(values) or BAD_DIGEST in values[0]:
            bad = self._judge()
        if bad and not self._second:
            self._repair(bad)
            return
        self._scrub.report.repaired_blocks += self._found - len(bad)
        self._scrub.job_ended(self._layer, self._count)

    def _judge(self) -> list[tuple[Link, int]]:
        """Which blocks are bad, and, noted in the report, which differ."""
        report, bad = self._scrub.report, []
        for number in range(self._count):
            at = number * DIGEST_BYTES
            values = {link: d[at : at + DIGEST_BYTES] for link, d in self._digests.items()}
            bad += [(link, number) for link, value in values.items() if value == BAD_DIGEST]
            sound = [value for value in values.values() if value != BAD_DIGEST]
            if len(set(sound)) > 1:
                ((good, _),) = Counter(sound).most_common(1)
                others = [link for link in values if values[link] not in (good, BAD_DIGEST)]
                if not self._second:
                    report.differing_blocks += len(others)
                    for link in others:
                        report.found(link, 1)
                self._scrub.differ(others)
        return bad

    def _repair(self, bad: list[tuple[Link, int]]) -> None:
        report = self._scrub.report
        left = self._found = len(bad)
        report.bad_blocks += left

        def next_view(link: Link, block: int, views: list[int]) -> None:
            nonlocal left

            def mended(count: int, error: BlockdError | None) -> None:
                nonlocal left
                if not count and len(views) > 1:
                    next_view(link, block, views[1:])
                    return
                left -= 1
                if not left:
                    self._second = True
                    self.start()

            self._engine.repairs.damaged(link, views[0], block, 1, mended)

        views = self._scrub.views_of(self._layer)
        for link, number in bad:
            report.found(link, 1)
            if views:
                next_view(link, self._first + number, views)
            else:
                left -= 1
        if not views:
            self._scrub.job_ended(self._layer, self._count)


def key_of(layer: dict[str, Any]) -> tuple[int, int]:
    """A layer and what lies below it."""
    return int(layer["id"]), int(layer["parent"])
