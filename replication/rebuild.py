"""Bringing an OUT member back by a full copy, while requests go on.

The steps, and what a death at each of them leaves:

1. The record says SYNCING.             The next open treats SYNCING like OUT.
2. The barrier, in a turn of its own among snapshots: a source names its layer tree; BEGIN_SYNC
   makes the member drop its content, take over that tree, and be marked incomplete on its disk.
   From here on it is a target and gets every write: BEGIN_SYNC and the writes after it stand
   in the same queue.
3. Every layer that existed at the barrier is copied, oldest first, region by region. The live
   head's regions are copied under the range lock: writes to that region wait meanwhile, and what
   was written since the barrier is in the source's copy, because links are first in, first out.
4. END_SYNC: the member builds its index from the layers, flushes and is marked complete.
5. The record says IN_SYNC; only then is the member read.

Folding moves blocks between layers, so members may hold one content in different layers. Therefore
folding pauses during the copy, and when a source is lost or cannot read a region, the rebuild goes
back to step 2 with another one. Checksums travel with the blocks; the member checks them before it
stores them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError, ConflictError, StateError
from protocol.units import BLOCKS_PER_REGION
from replication import membership
from replication.authority import IN_SYNC, OUT, SYNCING, Record
from replication.turns import Done

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

WINDOW = 2  # regions under way: one is read while the other is written; 8 MiB of memory at most


class Rebuild:
    """One member's way from OUT to IN_SYNC. `done` is called once, with the error or None."""

    def __init__(self, engine: Engine, link: Link, done: Done) -> None:
        self._engine = engine
        self._link = link
        self._done = done
        self._source: Link | None = None
        self._bad_sources: list[Link] = []
        self._attempt = 0  # what an earlier attempt asked for is ignored when it is answered
        self._layers: deque[int] = deque()
        self._todo: deque[tuple[int, int]] = deque()
        self._total = 0
        self._copied = 0
        self._under_way = 0
        self._head_id = 0
        self._ended = False

    # ---- step 1 -----------------------------------------------------------------------------

    def start(self) -> None:
        """Record SYNCING; raises if the rebuild cannot begin."""
        engine, link = self._engine, self._link
        if link.state != OUT or link.leaving:
            raise ConflictError(f"replica {link.replica_uuid} is {link.state}; nothing to rebuild")
        if not link.connected:
            raise StateError(
                f"replica {link.replica_uuid} at {link.address} is not connected; start its "
                "daemon first"
            )
        if engine.structure_busy:
            raise StateError(f"{engine.structure_busy} is under way; try again when it has ended")
        if not engine.readers:
            raise StateError("no replica in sync is reachable to copy from")
        engine.structure_busy = f"the rebuild of replica {link.replica_uuid}"
        link.state = SYNCING
        link.rebuild_fraction = 0.0
        engine.ledger.change(
            lambda record: record.with_state(link.replica_uuid, SYNCING), self._recorded
        )

    def _recorded(self, error: BlockdError | None) -> None:
        if error is not None or not self._link.connected:
            self._end(error or StateError("the replica was lost"))
        else:
            self._engine.changes.take(self._barrier, lambda error: None)

    # ---- step 2 -----------------------------------------------------------------------------

    def _barrier(self, end: Done) -> None:
        """In a turn, so that no seal comes between the source's tree and BEGIN_SYNC."""
        if self._ended:
            end(None)
            return
        sources = [link for link in self._engine.readers if link not in self._bad_sources]
        if not sources:
            self._end(StateError("no replica in sync is left that can be copied from"))
            end(None)
            return
        source = self._source = sources[0]
        attempt = self._attempt = self._attempt + 1
        self._todo.clear()
        self._under_way = self._copied = 0
        self._pause_folding(True)

        def described(tree: dict[str, Any]) -> None:
            if attempt == self._attempt and not self._ended:
                self._begin(tree)
            end(None)

        def failed(error: BlockdError) -> None:
            end(None)
            self._source_failed(source, attempt)

        self._ask(source, {"do": "tree"}, described, failed)

    def _begin(self, tree: dict[str, Any]) -> None:
        record = self._engine.record
        self._head_id = int(tree["head_id"])
        self._layers = deque(parents_first(tree["layers"]))
        content = {
            "do": "begin_sync",
            "layers": tree["layers"],
            "head_id": self._head_id,
            "volume_uuid": record.volume_uuid,
            "volume_name": record.volume_name,
            "size_bytes": record.size_bytes,
        }
        attempt = self._attempt
        self._ask(self._link, content, lambda answer: self._list_layers(attempt), self._end)
        if self._link not in self._engine.targets and self._link.connected:
            membership.enter_syncing(self._engine, self._link)

    # ---- step 3 -----------------------------------------------------------------------------

    def _list_layers(self, attempt: int) -> None:
        """Ask the source which regions of each layer hold anything."""
        if attempt != self._attempt or self._ended:
            return
        if not self._layers:
            self._total = len(self._todo)
            self._pump()
            return
        layer_id = self._layers.popleft()
        source = self._source
        assert source is not None

        def listed(answer: dict[str, Any]) -> None:
            if attempt == self._attempt:
                self._todo.extend((layer_id, int(region)) for region in answer["regions"])
                self._list_layers(attempt)

        content = {"do": "layer_regions", "layer_id": layer_id}
        self._ask(source, content, listed, lambda error: self._source_failed(source, attempt))

    def _pump(self) -> None:
        """Keep WINDOW regions under way; when all are copied, go on to step 4."""
        attempt = self._attempt  # a copy that fails at once begins a new one
        while self._todo and self._under_way < WINDOW:
            layer_id, region = self._todo.popleft()
            self._under_way += 1
            if layer_id == self._head_id:
                self._copy_locked(layer_id, region)
            else:
                self._copy(layer_id, region, attempt, lambda: None)
            if self._ended or attempt != self._attempt:
                return
        if not self._todo and not self._under_way:
            self._under_way = 1  # END_SYNC is asked for once
            self._ask(self._link, {"do": "end_sync"}, lambda answer: self._promote(), self._end)

    def _copy_locked(self, layer_id: int, region: int) -> None:
        first = region * BLOCKS_PER_REGION
        stop = first + BLOCKS_PER_REGION
        locks, attempt = self._engine.locks, self._attempt
        locks.acquire(
            first,
            stop,
            lambda: self._copy(layer_id, region, attempt, lambda: locks.release(first, stop)),
        )

    def _copy(self, layer_id: int, region: int, attempt: int, release: Callable[[], None]) -> None:
        source = self._source
        if self._ended or attempt != self._attempt or source is None:
            release()
            return

        def read(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if attempt != self._attempt or self._ended:
                release()
            elif error is not None or payload is None:
                release()
                self._source_failed(source, attempt)
            else:
                copy = memoryview(bytes(payload))  # outlives the source's receive buffer
                self._engine.call(
                    self._link,
                    wire.LAYER_WRITE,
                    written,
                    length=wire.map_checksum(copy),
                    offset=region,
                    argument=layer_id,
                    payload=[copy],
                )

        def written(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            release()
            if attempt != self._attempt or self._ended:
                return
            if error is not None:
                self._end(error)
                return
            self._under_way -= 1
            self._copied += 1
            self._link.rebuild_fraction = self._copied / max(1, self._total)
            self._pump()

        self._engine.call(source, wire.LAYER_READ, read, offset=region, argument=layer_id)

    def _source_failed(self, source: Link, attempt: int) -> None:
        """Start over with another source; whoever failed once is not asked again."""
        if attempt != self._attempt or self._ended:
            return
        self._attempt += 1
        source.errors += 1
        self._bad_sources.append(source)
        self._engine.changes.take(self._barrier, lambda error: None)

    # ---- steps 4 and 5 ----------------------------------------------------------------------

    def _promote(self) -> None:
        engine, link = self._engine, self._link

        def recorded(error: BlockdError | None) -> None:
            if error is not None or not link.connected:
                self._end(error or StateError("the replica was lost"))
                return
            link.state = IN_SYNC
            self._finish(None)
            engine.set_members(engine.targets, [*engine.readers, link])

        def change(record: Record) -> Record:
            if not link.connected:
                raise StateError(f"replica {link.replica_uuid} was lost just before promotion")
            return record.with_state(link.replica_uuid, IN_SYNC)

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                self._end(error)
            else:
                engine.ledger.change(change, recorded)

        engine.flush_then(flushed)

    # ---- helpers ----------------------------------------------------------------------------

    def _ask(
        self,
        link: Link,
        content: dict[str, Any],
        then: Callable[[dict[str, Any]], None],
        failed: Callable[[BlockdError], None],
    ) -> None:
        """A control request; an answer that makes no sense fails like a refusal."""

        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is None:
                try:
                    answer = wire.json_content(payload)
                except wire.WireError as nonsense:
                    error = nonsense
                else:
                    then(answer)
                    return
            failed(error)

        self._engine.call(link, wire.CONTROL, reply, content=content)

    def _pause_folding(self, paused: bool) -> None:
        for link in self._engine.readers:
            content = {"do": "fold", "paused": paused}
            self._engine.call(link, wire.CONTROL, lambda a, p, e: None, content=content)

    def _end(self, error: BlockdError) -> None:
        """The rebuild failed: the member is OUT again and keeps nothing."""
        if self._ended:
            return
        link = self._link
        self._finish(error)
        self._engine.fail(link, f"rebuild failed: {error}")  # puts it OUT

    def _finish(self, error: BlockdError | None) -> None:
        self._ended = True
        self._engine.structure_busy = None
        self._link.rebuild_fraction = None
        self._pause_folding(False)
        self._done(error)


def parents_first(tree: list[dict[str, Any]]) -> list[int]:
    """Layer ids so that a parent comes before its children."""
    parents = {int(layer["id"]): int(layer["parent"]) for layer in tree}

    def depth(layer_id: int) -> int:
        count = 0
        while layer_id:
            layer_id = parents.get(layer_id, 0)
            count += 1
        return count

    return sorted(parents, key=lambda layer_id: (depth(layer_id), layer_id))
