"""One member of a running volume, as the engine sees it: what was sent and what was answered.

A link is made for every member of the record. The owner of the socket flushes `outbox` and hands
arriving frames to the engine. A link whose session ended is never reused: a member that comes
back gets a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protocol import replica as wire
from protocol.errors import BlockdError
from protocol.streams import Outbox
from replication.authority import OUT

Reply = Callable[[int, memoryview | None, BlockdError | None], None]
"""argument of the answer, its payload, or the error in place of both"""

ReadRequest = tuple[Any, Any, int, int, int, tuple["Link", ...]]
"""client, cookie, offset, length, layer id, members whose answer was no good"""


class Link:
    """A session with one replica.

    `applied` is the sequence up to which the replica has answered writes; `refused` holds the
    errno of those it did not apply.
    """

    __slots__ = (
        "address",
        "applied",
        "calls",
        "connected",
        "distrusted",
        "errors",
        "failure",
        "hello",
        "leaving",
        "outbox",
        "progress_at",
        "queue",
        "read_message",
        "reads",
        "reads_total",
        "rebuild_fraction",
        "refused",
        "replica_uuid",
        "state",
    )

    def __init__(self, replica_uuid: str, address: str, state: str = OUT) -> None:
        self.replica_uuid = replica_uuid
        self.address = address
        self.state = state
        self.connected = False
        self.failure: str | None = None
        self.distrusted = False  # it failed to make data durable once
        self.leaving = False  # its change to OUT is on the way to the record
        self.hello: dict[str, Any] = {}
        self.outbox = Outbox()
        self.queue = self.outbox.queue  # the hot path appends here
        self.read_message: Callable[[int, int, int, int], Any] = wire.read_header
        self.applied = 0
        self.refused: dict[int, int] = {}
        self.reads: dict[int, ReadRequest] = {}
        self.calls: dict[int, tuple[int, Reply]] = {}  # expected answer and who gets it
        self.progress_at = 0.0
        self.rebuild_fraction: float | None = None
        self.reads_total = 0
        self.errors = 0

    def fail_calls(self, error: BlockdError) -> None:
        """Answer every outstanding call with `error`."""
        calls, self.calls = self.calls, {}
        for _, reply in calls.values():
            reply(0, None, error)
