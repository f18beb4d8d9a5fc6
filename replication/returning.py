"""The last member in sync comes back while the volume is open.

What was under way when it was lost may or may not have happened there: a seal whose answer never
came, a revert that is still marked as pending in the record. The member says what it is; the
record follows it, and only then does it take part again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError
from replication import membership
from replication.structure import adopt_unrecorded, finish_revert
from replication.turns import Done

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link


def come_back(engine: Engine, link: Link) -> None:
    """Take the last member in again, in its turn among the changes of the structure."""
    link.connected = True
    engine.changes.take(_Return(engine, link).start, lambda error: None)


class _Return:
    def __init__(self, engine: Engine, link: Link) -> None:
        self._engine = engine
        self._link = link
        self._kept: list[int] = []  # layers that were deleted while it was away

    def start(self, end: Done) -> None:
        self._end = end
        self._call(wire.CONTROL, {"do": "tree"}, self._described)

    def _described(self, tree: dict[str, Any]) -> None:
        engine, record = self._engine, self._engine.record
        pending = record.pending
        removed = {layer.id for layer in record.layers if layer.removed}
        kept = self._kept = [
            int(layer["id"])
            for layer in tree["layers"]
            if int(layer["id"]) in removed and not layer["removed"]
        ]
        if pending is not None:
            if tree["head_id"] == pending["new_head_id"]:
                self._call(wire.FLUSH, None, lambda answer: self._reverted())
            else:
                content = {"do": "revert", **pending}
                self._call(wire.CONTROL, content, lambda answer: self._flush_revert())
        elif tree["head_id"] != record.head_id:
            changed = adopt_unrecorded(record, tree)
            dropped = [layer.id for layer in changed.layers if layer not in record.layers]
            dropped += kept
            engine.ledger.change(
                lambda newest: adopt_unrecorded(newest, tree), lambda error: self._drop(dropped)
            )
        else:
            self._drop(kept)

    def _flush_revert(self) -> None:
        self._call(wire.FLUSH, None, lambda answer: self._reverted())

    def _reverted(self) -> None:
        self._engine.ledger.change(finish_revert, lambda error: self._drop(self._kept))

    def _drop(self, dropped: list[int]) -> None:
        """The layers of a snapshot that did not happen, or was deleted meanwhile."""
        if not dropped:
            self._enter()
            return
        content = {"do": "remove", "layer_id": dropped[0]}
        self._call(wire.CONTROL, content, lambda answer: self._drop(dropped[1:]))

    def _enter(self) -> None:
        """After every change asked for before, so that members on their way out are out."""
        self._engine.ledger.change(lambda record: record, lambda error: self._entered())

    def _entered(self) -> None:
        if self._link.connected:
            membership.enter(self._engine, self._link)
        self._end(None)

    def _call(
        self,
        operation: int,
        content: dict[str, Any] | None,
        then: Callable[[dict[str, Any]], None],
    ) -> None:
        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is None:
                then(wire.json_content(payload))
                return
            self._engine.fail(self._link, f"it could not take part again: {error}")
            self._end(error)

        self._engine.call(self._link, operation, reply, content=content)
