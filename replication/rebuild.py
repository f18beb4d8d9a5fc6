"""Bringing an OUT member back by a full copy, while requests go on.

The steps, and what a death at each of them leaves:

1. The record says SYNCING.             The next open treats SYNCING like OUT.
2. BEGIN_SYNC: the member drops its content, takes over the layer tree, and is marked incomplete
   on its disk. From here on it is a target and gets every write (the barrier: BEGIN_SYNC and
   the writes after it stand in the same queue).
3. Every layer that existed at the barrier is copied, oldest first, region by region. The live
   head's regions are copied under the range lock: writes to that region wait meanwhile, and what
   was written since the barrier is in the source's copy, because links are first in, first out.
4. END_SYNC: the member builds its index from the layers, flushes and is marked complete.
5. The record says IN_SYNC; only then is the member read.

Layers below the head do not change, so any member in sync can be asked for them: when the source
is lost the copy goes on from another one. Checksums travel with the blocks and are checked by
the member before it stores them.
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

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

WINDOW = 2  # regions under way: one is read while the other is written; 8 MiB of memory at most

Done = Callable[[BlockdError | None], None]


class Rebuild:
    """One member's way from OUT to IN_SYNC. `done` is called once, with the error or None."""

    def __init__(self, engine: Engine, link: Link, done: Done) -> None:
        self._engine = engine
        self._link = link
        self._done = done
        self._source: Link | None = None
        self._layers: list[int] = []
        self._listed = 0
        self._todo: deque[tuple[int, int]] = deque()
        self._total = 0
        self._copied = 0
        self._under_way = 0
        self._head_id = 0
        self._ended = False

    def start(self) -> None:
        """Step 1."""
        engine, link = self._engine, self._link
        if link.state != OUT:
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
        """Step 2."""
        if error is not None or not self._link.connected:
            self._end(error or StateError("the replica was lost"))
            return
        engine, record = self._engine, self._engine.record
        self._head_id = record.head_id
        tree = [
            {
                "id": layer.id,
                "parent": layer.parent,
                "name": layer.name,
                "created": layer.created,
                "labels": dict(layer.labels),
                "removed": layer.removed,
            }
            for layer in record.layers
        ]
        tree.append(
            {
                "id": record.head_id,
                "parent": record.head_parent,
                "name": "",
                "created": "",
                "labels": {},
                "removed": False,
            }
        )
        self._layers = parents_first(tree)
        content = {
            "do": "begin_sync",
            "layers": tree,
            "head_id": record.head_id,
            "volume_uuid": record.volume_uuid,
            "volume_name": record.volume_name,
            "size_bytes": record.size_bytes,
        }
        self._pause_folding(True)
        self._call(self._link, content, lambda answer: self._list_layers())
        membership.enter_syncing(engine, self._link)

    def _list_layers(self) -> None:
        """Step 3: ask a source which regions of which layer hold anything."""
        source = self._pick_source()
        if source is None or self._ended:
            return
        if self._listed == len(self._layers):
            self._total = len(self._todo)
            self._pump()
            return
        layer_id = self._layers[self._listed]

        def listed(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is not None:
                self._source_failed(source, error, self._list_layers)
                return
            regions = wire.json_content(payload).get("regions", [])
            self._todo.extend((layer_id, region) for region in regions)
            self._listed += 1
            self._list_layers()

        content = {"do": "layer_regions", "layer_id": layer_id}
        self._engine.call(source, wire.CONTROL, listed, content=content)

    def _pump(self) -> None:
        """Keep WINDOW regions under way; when all are copied, go on to step 4."""
        while not self._ended and self._todo and self._under_way < WINDOW:
            layer_id, region = self._todo.popleft()
            self._under_way += 1
            if layer_id == self._head_id:
                self._copy_locked(layer_id, region)
            else:
                self._copy(layer_id, region, lambda: None)
        if not self._ended and not self._todo and not self._under_way:
            self._call(self._link, {"do": "end_sync"}, lambda answer: self._promote())

    def _copy_locked(self, layer_id: int, region: int) -> None:
        first = region * BLOCKS_PER_REGION
        stop = first + BLOCKS_PER_REGION
        locks = self._engine.locks
        locks.acquire(
            first,
            stop,
            lambda: self._copy(layer_id, region, lambda: locks.release(first, stop)),
        )

    def _copy(self, layer_id: int, region: int, release: Callable[[], None]) -> None:
        if self._ended:
            release()
            return
        source = self._pick_source()
        if source is None:
            release()
            return

        def read(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is not None or payload is None:
                self._source_failed(
                    source, error, lambda: self._copy(layer_id, region, release), release
                )
                return
            copy = memoryview(bytes(payload))  # outlives the source's receive buffer
            self._engine.call(
                self._link,
                wire.LAYER_WRITE,
                written,
                offset=region,
                argument=layer_id,
                payload=[copy],
            )

        def written(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            release()
            self._under_way -= 1
            if error is not None:
                self._end(error)
                return
            self._copied += 1
            self._link.rebuild_fraction = self._copied / max(1, self._total)
            self._pump()

        self._engine.call(source, wire.LAYER_READ, read, offset=region, argument=layer_id)

    def _promote(self) -> None:
        """Step 5."""
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

    # ---- helpers --------------------------------------------------------------------------

    def _pause_folding(self, paused: bool) -> None:
        """Folding moves blocks between layers; a copied list of regions must stay true."""
        for link in self._engine.readers:
            content = {"do": "fold", "paused": paused}
            self._engine.call(link, wire.CONTROL, lambda a, p, e: None, content=content)

    def _pick_source(self) -> Link | None:
        if self._source is None or not self._source.connected:
            readers = self._engine.readers
            if not readers:
                self._end(StateError("no replica in sync is left to copy from"))
                return None
            self._source = readers[0]
        return self._source

    def _source_failed(
        self,
        source: Link,
        error: BlockdError | None,
        again: Callable[[], None],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        if source.connected and source in self._engine.readers:
            others = [link for link in self._engine.readers if link is not source]
            source.errors += 1
            if source is self._source and not others:
                release()
                self._end(error or StateError("the source cannot be read"))
                return
            self._source = others[0] if others else self._source
        if self._ended:
            release()
            return
        again()

    def _call(
        self, link: Link, content: dict[str, Any], then: Callable[[dict[str, Any]], None]
    ) -> None:
        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is not None:
                self._end(error)
            elif not self._ended:
                then(wire.json_content(payload))

        self._engine.call(link, wire.CONTROL, reply, content=content)

    def _end(self, error: BlockdError) -> None:
        """The rebuild failed: the member is OUT again and keeps nothing."""
        if self._ended:
            return
        link = self._link
        was_target = link in self._engine.targets
        self._finish(error)
        self._engine.fail(link, f"rebuild failed: {error}")
        if not was_target:
            membership.put_out(self._engine, link)

    def _finish(self, error: BlockdError | None) -> None:
        self._ended = True
        self._engine.structure_busy = None
        self._link.rebuild_fraction = None
        self._pause_folding(False)
        self._done(error)


def parents_first(tree: list[dict[str, Any]]) -> list[int]:
    """Layer ids so that a parent comes before its children.

    A removed layer's blocks move towards its child in the background; copying the parent first
    means a block that moves in between is copied twice, never missed.
    """
    parents = {layer["id"]: layer["parent"] for layer in tree}

    def depth(layer_id: int) -> int:
        count = 0
        while layer_id:
            layer_id = parents.get(layer_id, 0)
            count += 1
        return count

    return sorted(parents, key=lambda layer_id: (depth(layer_id), layer_id))
