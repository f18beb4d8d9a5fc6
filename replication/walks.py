"""Who walks the layers of the members: rebuilds and scrubs.

While anybody does, members do not fold removed layers by themselves (folding would move blocks
between the layers that are compared), and requests of clients are timed one after the other, so
that the walk can slow down for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

Answered = Callable[[dict[str, Any]], None]
Failed = Callable[[BlockdError], None]


class Walks:
    """All walks of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._walkers: set[object] = set()

    def begin(self, walker: object) -> None:
        """Pause folding on every member that is read; also those that came since the last time."""
        self._walkers.add(walker)
        self._engine.latency.contended = True
        self._tell(True)

    def end(self, walker: object) -> None:
        """After the last one folding goes on."""
        self._walkers.discard(walker)
        if not self._walkers:
            self._engine.latency.contended = False
            self._tell(False)

    def _tell(self, paused: bool) -> None:
        for link in self._engine.readers:
            content = {"do": "fold", "paused": paused}
            self._engine.call(link, wire.CONTROL, _ignore, content=content)


def _ignore(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
    """A member that cannot do it is lost or has no layers to fold."""


Question = tuple["Link", Mapping[str, Any], Callable[[int], None]]
"""a member, a layer of its tree, and what hears of each region in which the member has an entry"""


def ask_regions(
    ask: Callable[[Link, dict[str, Any], Answered, Failed], None],
    questions: Sequence[Question],
    then: Callable[[], None],
    failed: Failed,
    first: int = 0,
) -> None:
    """Ask members for the regions of layers, from region `first` on, one after the other."""
    if not questions:
        then()
        return
    link, layer, note = questions[0]

    def answered(answer: dict[str, Any]) -> None:
        for start, count in answer["regions"]:
            for region in range(int(start), int(start) + int(count)):
                note(region)
        following = answer["next"]
        left = questions if following is not None else questions[1:]
        ask_regions(ask, left, then, failed, int(following or 0))

    content = {"do": "layer_regions", "layer_id": layer["id"], "parent_id": layer["parent"]}
    ask(link, {**content, "first": first}, answered, failed)


def ask(
    engine: Engine,
    link: Link,
    content: dict[str, Any],
    then: Answered,
    failed: Failed,
) -> None:
    """A control request; `then(answer)` or `failed(error)`: an answer that makes no sense fails."""

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

    engine.call(link, wire.CONTROL, reply, content=content)
