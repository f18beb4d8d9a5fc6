"""Bringing an OUT member back while requests go on: what changed while it was away, or everything.

The steps, and what a death at each of them leaves:

1. The record says SYNCING.             The next open treats SYNCING like OUT.
2. The barrier, in a turn of its own among snapshots: a source names its layer tree, BEGIN_SYNC
   makes the member take it over and be incomplete, durably. From here on it is a target and gets
   every write: BEGIN_SYNC and the writes after it stand in the same queue.
3. The zones in which it may differ: those that changed on the source since the member was lost
   (`Member.out_at`) and its own dirty ones; all zones of layers that are new to it.
4. Blocks of these zones are compared by hash, layer by layer, and copied where they differ; where
   the member has nothing, they are copied. Any member in sync is a source: they take turns. Blocks
   of the live head are held by the range lock meanwhile.
5. Verification: source and member say a digest of their maps at the same point of the order. (Data
   was compared with its checksums when the member stored it.)
6. END_SYNC: the member makes its index, flushes, and is complete.
7. Flush of all, then the record says IN_SYNC; only then is the member read.

If this, the member or a source dies, the member keeps what it has; the next attempt compares again
and copies what is still different.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protocol.errors import BlockdError, ConflictError, NotFoundError, PeerError, StateError
from protocol.trees import logical_tree
from replication import membership
from replication.authority import IN_SYNC, OUT, SYNCING, Record
from replication.copyjobs import CopyJobs
from replication.pace import Pace
from replication.plan import Plan, check_jobs
from replication.turns import Done
from replication.walks import ask

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

ATTEMPTS_MAX = 8  # beginnings of one rebuild: the tree may change under it, sources may be lost


class Rebuild:
    """One member's way from OUT to IN_SYNC. `done` is called once, with the error or None."""

    def __init__(self, engine: Engine, link: Link, done: Done, pace: Pace | None = None) -> None:
        self.engine = engine
        self.link = link
        self.pace = pace or Pace()
        self.copied_bytes = 0
        self.compared_bytes = 0
        self.plan: Plan | None = None
        self._started_at = engine.now()
        self._done = done
        self._attempt = 0  # what an earlier attempt asked for is ignored when it is answered
        self._fresh = False
        self._bad_sources: list[Link] = []
        self._jobs: CopyJobs | None = None
        self._ended = False

    # ---- step 1 -----------------------------------------------------------------------------

    def start(self) -> None:
        """Record SYNCING; raises if the rebuild cannot begin."""
        engine, link = self.engine, self.link
        if link.state != OUT or link.leaving:
            raise ConflictError(f"replica {link.replica_uuid} is {link.state}; nothing to rebuild")
        if not link.connected:
            raise StateError(
                f"replica {link.replica_uuid} at {link.address} is not connected; start its "
                "daemon first"
            )
        if not engine.readers:
            raise StateError("no replica in sync is reachable to copy from")
        engine.rebuilds.add(self)
        link.state = SYNCING
        link.rebuild = self
        engine.ledger.change(
            lambda record: record.with_state(link.replica_uuid, SYNCING), self._recorded
        )

    def _recorded(self, error: BlockdError | None) -> None:
        if error is not None or not self.link.connected:
            self._end(error or StateError("the replica was lost"))
        else:
            self.engine.changes.take(self._barrier, lambda error: None)

    # ---- step 2 -----------------------------------------------------------------------------

    def _barrier(self, end: Done) -> None:
        """In a turn, so that no seal comes between the source's tree and BEGIN_SYNC."""
        if self._ended:
            end(None)
            return
        attempt = self._attempt = self._attempt + 1
        source = self._source()
        if source is None or attempt > ATTEMPTS_MAX:
            why = f"{ATTEMPTS_MAX} attempts failed" if source else "no replica in sync is left"
            self._end(StateError(f"the rebuild was given up: {why}"))
            end(None)
            return
        self.engine.walks.begin(self)
        self.compared_bytes = 0

        def described(tree: dict[str, Any]) -> None:
            if self.is_current(attempt):
                self._begin(source, tree)
            end(None)

        def failed(error: BlockdError) -> None:
            end(None)
            self.start_over(attempt, error, source)

        self.ask(source, {"do": "tree"}, described, failed)

    def _begin(self, source: Link, described: dict[str, Any]) -> None:
        record, attempt = self.engine.record, self._attempt
        head_id = int(described["head_id"])
        tree = logical_tree(described["layers"], head_id)
        content = {
            "do": "begin_sync",
            "layers": tree,
            "head_id": head_id,
            "volume_uuid": record.volume_uuid,
            "volume_name": record.volume_name,
            "size_bytes": record.size_bytes,
            "fresh": self._fresh,
        }
        plan = self.plan = Plan(tree, head_id)
        member = record.members.get(self.link.replica_uuid)
        since = member.out_at if member is not None else 0

        def begun(answer: dict[str, Any]) -> None:
            plan.add_zones(answer["zones"])
            plan.all_zones_of = {int(layer_id) for layer_id in answer["new"]}
            self.ask(source, {"do": "zones", "since": since}, zones_known, failed)

        def zones_known(answer: dict[str, Any]) -> None:
            if self.is_current(attempt):
                plan.add_zones(answer["zones"])
                plan.ask_regions(self, source, lambda: self._copy(attempt), failed)

        def failed(error: BlockdError) -> None:
            self.start_over(attempt, error, source)

        def refused(error: BlockdError) -> None:
            if isinstance(error, StateError) and not self._fresh:
                self._fresh = True  # what it holds does not fit: fill it anew
                self.start_over(attempt, error)
            else:
                self._end(error)

        if since == 0:
            plan.every_zone = True
        self.ask(self.link, content, begun, refused)
        if self.link not in self.engine.targets and self.link.connected:
            membership.enter_syncing(self.engine, self.link)

    # ---- steps 4 to 6 -----------------------------------------------------------------------

    def _copy(self, attempt: int) -> None:
        if self.is_current(attempt):
            assert self.plan is not None
            jobs = self.plan.copy_jobs()
            self._jobs = CopyJobs(self, attempt, jobs, lambda: self._verify(attempt))
            self._jobs.pump()

    def _verify(self, attempt: int) -> None:
        """Ask source and member for digests of the same regions, one pair after the other."""
        assert self.plan is not None
        checks = check_jobs(self.plan)

        def next_check() -> None:
            source = self._source()
            if not self.is_current(attempt):
                return
            if source is None:
                self.start_over(attempt, StateError("no replica in sync is left"))
                return
            job = next(checks, None)
            if job is None:
                self._take_stamps(attempt, source, 0)
                return
            layer_id, parent_id, first, count = job
            content = {"do": "layer_check", "layer_id": layer_id, "parent_id": parent_id}
            content |= {"first": first, "count": count}
            digests: list[str] = []

            def answered(answer: dict[str, Any]) -> None:
                digests.append(str(answer["digest"]))
                if len(digests) < 2 or not self.is_current(attempt):
                    return
                if digests[0] != digests[1]:
                    what = f"layer {layer_id}: {count} regions from {first} on differ"
                    self.start_over(attempt, StateError(what))
                else:
                    next_check()

            def source_failed(error: BlockdError) -> None:
                self.start_over(attempt, error, source)

            self.ask(source, content, answered, source_failed)  # both at one point of the order
            self.ask(self.link, content, answered, self._end)

        next_check()

    def _take_stamps(self, attempt: int, source: Link, first: int) -> None:
        """The member remembers what changed while it was away: it may be a source later."""

        def known(answer: dict[str, Any]) -> None:
            if not self.is_current(attempt):
                return
            following = answer["next"]
            content = {"do": "stamp", "stamps": answer["stamps"]}
            self.ask(self.link, content, lambda _: stored(following), self._end)

        def stored(following: int | None) -> None:
            if not self.is_current(attempt):
                return
            if following is not None:
                self._take_stamps(attempt, source, following)
            else:
                self.ask(self.link, {"do": "end_sync"}, lambda _: self._promote(attempt), self._end)

        content = {"do": "stamps", "first": first, "config_seq": self.engine.record.config_seq}
        self.ask(source, content, known, lambda error: self.start_over(attempt, error, source))

    # ---- step 7 -----------------------------------------------------------------------------

    def _promote(self, attempt: int) -> None:
        engine, link = self.engine, self.link
        if not self.is_current(attempt):
            return

        def recorded(error: BlockdError | None) -> None:
            link.promoting = False
            if error is not None or not link.connected:
                self._end(error or StateError("the replica was lost"))
                return
            link.state = IN_SYNC
            self._finish(None)
            engine.set_members(engine.targets, [*engine.readers, link])
            membership.tell_config(engine, lambda: None)

        def change(record: Record) -> Record:
            if not link.connected:
                raise StateError(f"replica {link.replica_uuid} was lost just before promotion")
            return record.with_state(link.replica_uuid, IN_SYNC)

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                self._end(error)
                return
            link.promoting = True
            engine.lease.members_changed()
            engine.ledger.change(change, recorded)

        engine.flush_then(flushed)

    # ---- helpers ----------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """What a user wants to know of it: fraction, bytes, seconds left (None: not known yet)."""
        total = self.plan.total_bytes if self.plan is not None else 0
        fraction = min(1.0, self.compared_bytes / total) if total else 0.0
        elapsed = self.engine.now() - self._started_at
        left = elapsed / fraction - elapsed if fraction > 0.01 else None
        return {
            "fraction": fraction,
            "total_bytes": total,
            "copied_bytes": self.copied_bytes,
            "seconds_left": left,
        }

    def moved(self, count_bytes: int) -> None:
        """So much data was copied."""
        self.copied_bytes += count_bytes
        self.pace.moved(count_bytes)

    def is_current(self, attempt: int) -> bool:
        """Is this attempt the one that counts?"""
        return attempt == self._attempt and not self._ended

    def _source(self) -> Link | None:
        """The member whose turn it is, or another one that has not failed."""
        reader = self.engine.reader
        if reader is None or reader not in self._bad_sources:
            return reader
        return next((link for link in self.engine.readers if link not in self._bad_sources), None)

    def start_over(self, attempt: int, error: BlockdError, source: Link | None = None) -> None:
        """A source was lost or could not do it, or the tree has changed: from the barrier again."""
        if self.is_current(attempt):
            if source is not None and not isinstance(error, StateError | NotFoundError):
                source.errors += 1
                self._bad_sources.append(source)
            self._attempt += 1
            self.link.failure = f"its rebuild begins again: {error}"
            self.engine.changes.take(self._barrier, lambda error: None)

    def failed(self, attempt: int, error: BlockdError) -> None:
        """The member itself cannot go on."""
        if not self.is_current(attempt):
            return
        if isinstance(error, StateError) and not isinstance(error, PeerError) and not self._fresh:
            self._fresh = True
            self.start_over(attempt, error)
        else:
            self._end(error)

    def ask(
        self,
        link: Link,
        content: dict[str, Any],
        then: Callable[[dict[str, Any]], None],
        failed: Callable[[BlockdError], None],
    ) -> None:
        """A control request."""
        ask(self.engine, link, content, then, failed)

    def abort(self, reason: str) -> None:
        """Give up: the member keeps what it has and is OUT again."""
        self._end(StateError(reason))

    def _end(self, error: BlockdError) -> None:
        """The rebuild failed: the member is OUT again."""
        if self._ended:
            return
        link = self.link
        self._finish(error)
        self.engine.fail(link, f"rebuild failed: {error}")  # puts it OUT

    def _finish(self, error: BlockdError | None) -> None:
        self._ended = True
        self.engine.rebuilds.discard(self)
        self.link.rebuild = None
        self.engine.walks.end(self)
        self._done(error)
