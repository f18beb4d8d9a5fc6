"""How much data the volume and each snapshot show, and what deleting one gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockd.daemons.control import Answer
from protocol.errors import BlockdError, DegradedError
from replication.walks import ask

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link


class UsageCount:
    """One answer: a member counts region by region; if it is lost, another one from the start.

    Snapshots that are deleted meanwhile are left out.
    """

    def __init__(self, engine: Engine, answer: Answer) -> None:
        self._engine = engine
        self._answer = answer
        self._tried: set[Link] = set()

    def start(self) -> None:
        """Ask the next member that can be read."""
        engine = self._engine
        link = next((link for link in engine.readers if link not in self._tried), None)
        if link is None:
            self._answer(DegradedError("no replica in sync could count what is used; try later"))
            return
        self._tried.add(link)
        self._found: dict[int, list[int]] = {}
        self._go_on(link, 0)

    def _go_on(self, link: Link, first: int) -> None:
        def counted(answer: dict[str, Any]) -> None:
            for layer_id, (seen, own) in answer["usage"]:
                total = self._found.setdefault(int(layer_id), [0, 0])
                total[0] += int(seen)
                total[1] += int(own)
            if answer["next"] is None:
                self._done()
            else:
                self._go_on(link, int(answer["next"]))

        def failed(error: BlockdError) -> None:
            self.start()

        ask(self._engine, link, {"do": "usage", "first": first}, counted, failed)

    def _done(self) -> None:
        record, found = self._engine.record, self._found
        snapshots = {
            layer.name: {"data_bytes": found[layer.id][0], "exclusive_bytes": found[layer.id][1]}
            for layer in record.layers
            if layer.name and layer.id in found
        }
        live = found.get(record.head_id, [0, 0])[0]
        self._answer({"data_bytes": live, "snapshots": snapshots})
