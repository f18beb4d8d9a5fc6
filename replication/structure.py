"""Changes of the layer tree and of the size: the same on every member or not at all.

A change travels in the links' queues like a write, so it stands at the same point of the order on
every member without stopping the requests around it: writes queued before it are below the seal,
writes queued after it are above. The order of durable steps:

- snapshot: seal on all targets, flush all, then the record. A death before the record leaves a
  layer the record does not know; the next open removes it (its blocks stay readable below the
  head). A death after it: done.
- delete: the record first (marked removed), then the members. A member that did not do it (its
  disk is full to the last byte, or it was away) is told again, by the next open at the latest.
- grow: the members first, durably, then the record. A death in between leaves members that are
  larger than the volume, which does no harm.
- revert: the record names the revert as pending, the members do it and flush, the record drops
  the mark. The next open, or the last member coming back (returning.py), finishes a pending one.

One change at a time; a rebuild excludes a revert, which drops a layer that is being copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
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
from protocol.units import SNAPSHOTS_MAX, check_name, check_size
from replication import membership
from replication.authority import IN_SYNC, LayerRecord, Record
from replication.turns import Done

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

LABELS_MAX = 32  # labels of one snapshot; 254 snapshots' worth still fits one control message
LABEL_CHARACTERS_MAX = 256
LABELS_BYTES_MAX = 12 << 10  # of all labels of a snapshot as JSON: 254 times that fits, too


def control_all(
    engine: Engine, content: dict[str, Any], done: Done, some: Iterable[Link] | None = None
) -> None:
    """Send one control request to every target (or to `some`), at one point of the order.

    If every member in sync refuses, `done(error)`: nothing changed (a PeerError: they were lost,
    and it may have happened). A target that did otherwise than those in sync fails.
    """
    targets = list(engine.targets if some is None else some)
    results: dict[Link, BlockdError | None] = {}
    if not targets:
        done(StateError("no replica in sync is reachable; nothing was changed"))
        return

    def answered(link: Link, error: BlockdError | None) -> None:
        results[link] = error
        if len(results) < len(targets):
            return
        in_sync = [link for link in targets if link.state == IN_SYNC] or targets
        failures = [failure for link in in_sync if (failure := results[link]) is not None]
        if len(failures) == len(in_sync):
            refusals = [failure for failure in failures if not isinstance(failure, PeerError)]
            behind = [link for link in targets if results[link] is None]
            outcome: BlockdError | None = (refusals or failures)[0]
        else:
            behind = [link for link in targets if results[link] is not None]
            outcome = None
        for other in behind:
            engine.fail(other, f"{content['do']} went another way here: {results[other]}")
        done(outcome)

    def ask(link: Link) -> None:
        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            answered(link, error)

        engine.call(link, wire.CONTROL, reply, content=content)

    for link in targets:
        ask(link)


class Structure:
    """Serialises the changes of one volume's layer tree."""

    def __init__(self, engine: Engine, timestamp: Callable[[], str]) -> None:
        self.engine = engine
        self._timestamp = timestamp

    # ---- snapshot -------------------------------------------------------------------------

    def create(self, name: str, labels: dict[str, str], done: Done) -> None:
        """Seal the live volume as snapshot `name`."""
        check_name("snapshot", name)
        check_labels(labels)
        self.engine.changes.take(lambda end: self._create(name, labels, end), done)

    def _create(self, name: str, labels: dict[str, str], done: Done) -> None:
        record = self.engine.record
        if record.layer_named(name) is not None:
            raise ConflictError(
                f"snapshot {record.volume_name}@{name} exists already; choose another name or "
                "delete it first"
            )
        if len(record.layers) >= SNAPSHOTS_MAX and any(layer.removed for layer in record.layers):
            self._forget_folded(lambda error: self._seal_or_refuse(name, labels, done))
        else:
            self._seal(name, labels, done)

    def _seal_or_refuse(self, name: str, labels: dict[str, str], done: Done) -> None:
        """`_seal` outside of what the turn catches."""
        try:
            self._seal(name, labels, done)
        except BlockdError as error:
            done(error)

    def _seal(self, name: str, labels: dict[str, str], done: Done) -> None:
        engine, record = self.engine, self.engine.record
        self._refuse_when_full("make a snapshot")
        if len(record.layers) >= SNAPSHOTS_MAX:
            done(
                StateError(
                    f"volume {record.volume_name} has {len(record.layers)} layers, the limit is "
                    f"{SNAPSHOTS_MAX}; delete a snapshot first (deleted ones count until they "
                    "are folded in the background)"
                )
            )
            return
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
        self.engine.changes.take(lambda end: self._remove(name, end), done)

    def _remove(self, name: str, done: Done) -> None:
        layer = self.find(name)

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
                self._drop_layer(layer.id, lambda error: done(None))

        self.engine.ledger.change(change, recorded)

    def _drop_layer(self, layer_id: int, done: Done, some: Iterable[Link] | None = None) -> None:
        """Tell members of a deletion that is recorded. Who refuses is told again, see below."""
        control_all(self.engine, {"do": "remove", "layer_id": layer_id}, done, some)

    def forget_folded(self) -> None:
        """Drop the removed layers that no member has any more from the record.

        Members that still have one as if it was not removed are told again.
        """
        if any(layer.removed for layer in self.engine.record.layers):
            self.engine.changes.take(self._forget_folded, lambda error: None)

    def _forget_folded(self, done: Done) -> None:
        """In a turn: ask every target for its tree, then record what is gone everywhere."""
        engine = self.engine
        targets = list(engine.targets)
        present: set[int] = set()
        removed = {layer.id for layer in engine.record.layers if layer.removed}
        untold: dict[int, list[Link]] = {}
        left = len(targets)
        if not targets or engine.rebuilds:
            done(None)
            return

        def tell_again(error: BlockdError | None) -> None:
            if untold:  # the others at the next look
                layer_id, links = untold.popitem()
                self._drop_layer(layer_id, done, links)
            else:
                done(None)

        def answered(link: Link, payload: memoryview | None, error: BlockdError | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                present.update(removed)
            else:
                for layer in wire.json_content(payload)["layers"]:
                    present.add(int(layer["id"]))
                    if int(layer["id"]) in removed and not layer["removed"]:
                        untold.setdefault(int(layer["id"]), []).append(link)
            if left:
                return
            gone = list(removed - present)
            if gone:
                engine.ledger.change(lambda record: drop_layers(record, gone), tell_again)
            else:
                tell_again(None)

        def ask(link: Link) -> None:
            def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
                answered(link, payload, error)

            engine.call(link, wire.CONTROL, reply, content={"do": "tree"})

        for link in targets:
            ask(link)

    # ---- revert ---------------------------------------------------------------------------

    def revert(self, name: str, done: Done, revert_id: str = "") -> None:
        """Make the live volume equal to snapshot `name`; later snapshots stay.

        Asked for again by the same `revert_id` it is not done again: what was written since stays.
        """
        self.engine.changes.take(lambda end: self._revert(name, revert_id, end), done)

    def _revert(self, name: str, revert_id: str, done: Done) -> None:
        engine, before = self.engine, self.engine.record.reverted
        if revert_id and revert_id == before:
            is_over = engine.record.pending is None
            done(None if is_over else StateError(f"the revert to {name} is not finished yet"))
            return
        layer = self.find(name)
        self._refuse_during_rebuild("revert")
        self._refuse_when_full("revert")
        new_head = engine.record.next_layer_id
        intent = {"layer_id": layer.id, "new_head_id": new_head}

        def flushed(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                engine.ledger.change(finish_revert, done)

        def reverted(error: BlockdError | None) -> None:
            if isinstance(error, PeerError):  # lost: it may have happened, so it stays pending
                done(error)
            elif error is not None:
                engine.ledger.change(
                    lambda record: replace(record, pending=None, reverted=before),
                    lambda e: done(error),
                )
            else:
                engine.flush_then(flushed)

        def recorded(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                control_all(engine, {"do": "revert", **intent}, reverted)

        def change(record: Record) -> Record:
            return replace(record, pending=intent, reverted=revert_id, next_layer_id=new_head + 1)

        engine.ledger.change(change, recorded)

    # ---- grow -----------------------------------------------------------------------------

    def grow(self, size_bytes: int, done: Done) -> None:
        """Make the volume `size_bytes` long; what is new reads as zeros."""
        check_size(size_bytes)
        self.engine.changes.take(lambda end: self._grow(size_bytes, end), done)

    def _grow(self, size_bytes: int, done: Done) -> None:
        engine = self.engine
        name, before = engine.record.volume_name, engine.record.size_bytes
        if size_bytes < before:
            raise RequestError(
                f"volume {name} has {before} bytes and cannot shrink to {size_bytes}; choose a "
                "larger size, or copy what you need to a smaller volume"
            )
        if size_bytes == before:
            done(None)
            return
        self._refuse_during_rebuild("change the size")
        self._refuse_when_full("change the size")

        larger: set[str] = set()  # members that have grown

        def change(record: Record) -> Record:
            members = record.members.items()
            smaller = [u for u, member in members if member.state == IN_SYNC and u not in larger]
            if smaller:  # the last one in sync: it was lost meanwhile and is not put OUT
                raise StateError(f"replica {smaller[0]} was lost while it grew; try again")
            # The members note the configuration: an older record would hide the new part.
            return replace(record, size_bytes=size_bytes, config_seq=record.config_seq + 1)

        def recorded(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:
                membership.tell_config(engine, lambda: done(None))

        def grown(error: BlockdError | None) -> None:
            if error is not None:
                done(error)
            else:  # members that were lost meanwhile are OUT before the record is larger
                larger.update(link.replica_uuid for link in engine.targets if link.connected)
                engine.ledger.change(lambda r: r, lambda _: engine.ledger.change(change, recorded))

        control_all(engine, {"do": "grow", "size_bytes": size_bytes}, grown)

    # ---- common ---------------------------------------------------------------------------

    def find(self, name: str) -> LayerRecord:
        """The layer of snapshot `name`, or NotFoundError."""
        record = self.engine.record
        layer = record.layer_named(name) if name else None
        if layer is None:
            raise NotFoundError(
                f"snapshot {record.volume_name}@{name} does not exist; "
                f"`blockd snapshot ls {record.volume_name}` shows those that do"
            )
        return layer

    def _refuse_during_rebuild(self, what: str) -> None:
        if self.engine.rebuilds:
            names = ", ".join(sorted(item.link.replica_uuid for item in self.engine.rebuilds))
            raise StateError(
                f"cannot {what} of volume {self.engine.record.volume_name} during the rebuild of "
                f"replica {names}; wait until it has ended"
            )

    def _refuse_when_full(self, what: str) -> None:
        """It would wait behind writes that wait for space, and all trims behind it."""
        if self.engine.room.full:
            names = ", ".join(link.replica_uuid for link in self.engine.room.full)
            raise StateError(
                f"cannot {what} of volume {self.engine.record.volume_name} while there is no "
                f"space on the disk of replica {names}; trim the volume, delete snapshots or free "
                "space there first"
            )

    @property
    def busy(self) -> bool:
        """Is a change under way?"""
        return self.engine.changes.busy


def adopt_unrecorded(record: Record, described: Mapping[str, Any]) -> Record:
    """A snapshot that was sealed but never recorded did not happen: its layer is removed.

    `described` has the `head_id` and `layers` of a member; the record follows them.
    """
    head_id = int(described["head_id"])
    if head_id == record.head_id:
        return record
    parents = {int(layer["id"]): int(layer["parent"]) for layer in described["layers"]}
    record = replace(
        record,
        head_id=head_id,
        head_parent=parents[head_id],
        next_layer_id=max(record.next_layer_id, head_id + 1),
    )
    return with_unknown_layers(record, described["layers"])


def with_unknown_layers(record: Record, layers: Iterable[Mapping[str, Any]]) -> Record:
    """The record with layers of a member that it does not know, as removed ones.

    They are left of a snapshot that did not happen. Another member may have removed and folded
    its one already, when an owner died in between.
    """
    known = {record.head_id, *(layer.id for layer in record.layers)}
    extra = [
        LayerRecord(int(layer["id"]), int(layer["parent"]), removed=True)
        for layer in layers
        if int(layer["id"]) not in known
    ]
    return replace(record, layers=(*record.layers, *extra)) if extra else record


def finish_revert(record: Record) -> Record:
    """The record after its pending revert was done by every member."""
    pending = record.pending
    if pending is None:
        return record
    return replace(
        record,
        head_id=pending["new_head_id"],
        head_parent=pending["layer_id"],
        pending=None,
    )


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
    size = len(json.dumps(labels).encode())
    if size > LABELS_BYTES_MAX:
        raise RequestError(
            f"the labels take {size} bytes, the limit is {LABELS_BYTES_MAX}; use fewer or shorter"
        )
