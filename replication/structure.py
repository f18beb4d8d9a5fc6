"""Changes of the layer tree: snapshot, delete, revert; the same on every member or not at all.

A change travels in the links' queues like a write, so it stands at the same point of the order on
every member without stopping the requests around it: writes queued before it are below the seal,
writes queued after it are above. The order of durable steps:

- snapshot: seal on all targets, flush all, then the record. A death before the record leaves a
  layer the record does not know; the next open removes it (its blocks stay readable below the
  head). A death after it: done.
- delete: the record first (marked removed), then the members. The next open removes what a
  member still has by name.
- revert: the record names the revert as pending, the members do it and flush, the record drops
  the mark. The next open finishes a pending revert on members that have not done it.

One change at a time; a rebuild excludes delete and revert, because they move blocks between layers
that are being copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import (
    BlockdError,
    ConflictError,
    NotFoundError,
    PeerError,
    RequestError,
    StateError,
)
from protocol.units import SNAPSHOTS_MAX, check_name
from replication.authority import SYNCING, LayerRecord, Record

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

Done = Callable[[BlockdError | None], None]
LABELS_MAX = 32  # labels of one snapshot; 254 snapshots' worth still fits one control message
LABEL_CHARACTERS_MAX = 256


def control_all(engine: Engine, content: dict[str, Any], done: Done) -> None:
    """Send one control request to every target, at one point of the order.

    If every target refuses, `done(error)`: nothing changed. A target that refuses what another
    one did is behind and fails.
    """
    targets = list(engine.targets)
    results: dict[Link, BlockdError | None] = {}
    if not targets:
        done(StateError("no replica in sync is reachable; nothing was changed"))
        return

    def answered(link: Link, error: BlockdError | None) -> None:
        results[link] = error
        if len(results) < len(targets):
            return
        errors = [failure for failure in results.values() if failure is not None]
        refusals = [failure for failure in errors if not isinstance(failure, PeerError)]
        if len(errors) == len(targets):
            done((refusals or errors)[0])
            return
        for other, failure in results.items():
            if failure is not None:
                engine.fail(other, f"{content['do']} failed: {failure}")
        done(None)

    def ask(link: Link) -> None:
        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            answered(link, error)

        engine.call(link, wire.CONTROL, reply, content=content)

    for link in targets:
        ask(link)


class Structure:
    """Serialises the changes of one volume's layer tree."""

    def __init__(self, engine: Engine, timestamp: Callable[[], str]) -> None:
        self._engine = engine
        self._timestamp = timestamp
        self._queue: list[Callable[[], None]] = []

    # ---- snapshot -------------------------------------------------------------------------

    def create(self, name: str, labels: dict[str, str], done: Done) -> None:
        """Seal the live volume as snapshot `name`."""
        check_name("snapshot", name)
        check_labels(labels)
        self._start(lambda end: self._create(name, labels, end), done)

    def _create(self, name: str, labels: dict[str, str], done: Done) -> None:
        engine, record = self._engine, self._engine.record
        if record.layer_named(name) is not None:
            raise ConflictError(
                f"snapshot {record.volume_name}@{name} exists already; choose another name or "
                "delete it first"
            )
        if len(record.layers) >= SNAPSHOTS_MAX:
            raise StateError(
                f"volume {record.volume_name} has {len(record.layers)} layers, the limit is "
                f"{SNAPSHOTS_MAX}; delete a snapshot first (deleted ones count until they are "
                "folded in the background)"
            )
        sealed = LayerRecord(record.head_id, record.head_parent, name, self._timestamp(), labels)
        new_head = record.next_layer_id

        def recorded(newest: Record) -> Record:
            return replace(
                newest,
                layers=(*newest.layers, sealed),
                head_id=new_head,
                head_parent=sealed.id,
                next_layer_id=new_head + 1,
            )

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                engine.ledger.change(recorded, done)

        def sealed_everywhere(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                engine.flush_then(flushed)

        content = {
            "do": "seal",
            "new_head_id": new_head,
            "name": name,
            "created": sealed.created,
            "labels": labels,
        }
        control_all(engine, content, sealed_everywhere)

    # ---- delete ---------------------------------------------------------------------------

    def remove(self, name: str, done: Done) -> None:
        """Delete snapshot `name`; its space comes back in the background."""
        self._start(lambda end: self._remove(name, end), done)

    def _remove(self, name: str, done: Done) -> None:
        layer = self.find(name)
        self._refuse_during_rebuild("delete a snapshot")

        def change(record: Record) -> Record:
            layers = tuple(
                replace(other, name="", removed=True) if other.id == layer.id else other
                for other in record.layers
            )
            return replace(record, layers=layers)

        def recorded(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                control_all(self._engine, {"do": "remove", "layer_id": layer.id}, done)

        self._engine.ledger.change(change, recorded)

    def folded(self, present: set[int]) -> None:
        """Forget removed layers that no member has any more (`present`: ids some member has)."""
        gone = [
            layer.id
            for layer in self._engine.record.layers
            if layer.removed and layer.id not in present
        ]
        if gone and not self._queue and self._engine.structure_busy is None:
            self._engine.ledger.change(lambda record: drop_layers(record, gone), lambda error: None)

    # ---- revert ---------------------------------------------------------------------------

    def revert(self, name: str, done: Done) -> None:
        """Make the live volume equal to snapshot `name`; later snapshots stay."""
        self._start(lambda end: self._revert(name, end), done)

    def _revert(self, name: str, done: Done) -> None:
        engine = self._engine
        layer = self.find(name)
        self._refuse_during_rebuild("revert")
        new_head = engine.record.next_layer_id
        intent = {"layer_id": layer.id, "new_head_id": new_head}

        def finished(record: Record) -> Record:
            return replace(record, head_id=new_head, head_parent=layer.id, pending=None)

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                engine.ledger.change(finished, done)

        def reverted(error: BlockdError | None) -> None:
            if error is not None:
                engine.ledger.change(lambda record: replace(record, pending=None), lambda e: None)
                done(error)
            else:
                engine.flush_then(flushed)

        def recorded(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                control_all(engine, {"do": "revert", **intent}, reverted)

        engine.ledger.change(
            lambda record: replace(record, pending=intent, next_layer_id=new_head + 1), recorded
        )

    # ---- common ---------------------------------------------------------------------------

    def find(self, name: str) -> LayerRecord:
        """The layer of snapshot `name`, or NotFoundError."""
        record = self._engine.record
        layer = record.layer_named(name) if name else None
        if layer is None:
            raise NotFoundError(
                f"snapshot {record.volume_name}@{name} does not exist; "
                f"`blockd snapshot ls {record.volume_name}` shows those that do"
            )
        return layer

    def _refuse_during_rebuild(self, what: str) -> None:
        record = self._engine.record
        for uuid, member in record.members.items():
            if member.state == SYNCING:
                raise StateError(
                    f"cannot {what} of volume {record.volume_name} while replica {uuid} is "
                    "being rebuilt; wait until it is in sync"
                )

    def _start(self, work: Callable[[Done], None], done: Done) -> None:
        def run() -> None:
            try:
                work(end)
            except BlockdError as error:
                end(error)

        def end(error: BlockdError | None) -> None:
            self._queue.pop(0)
            done(error)
            if self._queue:
                self._queue[0]()

        self._queue.append(run)
        if len(self._queue) == 1:
            run()

    @property
    def busy(self) -> bool:
        """Is a change under way?"""
        return bool(self._queue)


def drop_layers(record: Record, gone: list[int]) -> Record:
    """The record without folded layers; their children move to the grandparent."""
    parents = {layer.id: layer.parent for layer in record.layers}

    def surviving(parent: int) -> int:
        while parent in gone:
            parent = parents[parent]
        return parent

    layers = tuple(
        replace(layer, parent=surviving(layer.parent))
        for layer in record.layers
        if layer.id not in gone
    )
    return replace(record, layers=layers, head_parent=surviving(record.head_parent))


def check_labels(labels: dict[str, str]) -> None:
    """RequestError unless `labels` is a small map of strings."""
    if len(labels) > LABELS_MAX:
        raise RequestError(f"{len(labels)} labels are over the limit of {LABELS_MAX}; use fewer")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str) or not key:
            raise RequestError(f"label {key!r} must be text with a text value")
        if len(key) + len(value) > LABEL_CHARACTERS_MAX:
            raise RequestError(
                f"label {key[:40]!r} has {len(key) + len(value)} characters, the limit is "
                f"{LABEL_CHARACTERS_MAX}; shorten it"
            )
