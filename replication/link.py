"""One member of a running volume, as the engine sees it: what was sent and what was answered.

A link is made for every member of the record. The owner of the socket flushes `outbox` and hands
arriving frames to the engine. A link whose session ended is never reused: a member that comes
back gets a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError
from protocol.streams import Outbox
from replication.authority import OUT

if TYPE_CHECKING:
    from replication.rebuild import Rebuild

Reply = Callable[[int, memoryview | None, BlockdError | None], None]
"""argument of the answer, its payload, or the error in place of both"""


class Reads:
    """Reads of whole blocks that one client asked for together.

    `tried` are the members whose answer was no good.
    """

    __slots__ = ("client", "cookies", "counts", "firsts", "layer_id", "sent_at", "tried")

    def __init__(
        self,
        client: Any,
        cookies: Sequence[Any],
        firsts: Sequence[int],
        counts: Sequence[int],
        layer_id: int,
        tried: tuple[Link, ...] = (),
    ) -> None:
        self.client = client
        self.cookies = cookies
        self.firsts = firsts
        self.counts = counts
        self.layer_id = layer_id
        self.tried = tried
        self.sent_at = 0.0  # if it is a sample of the latency

    def part(self, start: int, stop: int) -> Reads:
        """Some of them."""
        where = slice(start, stop)
        ranges = self.firsts[where], self.counts[where]
        return Reads(self.client, self.cookies[where], *ranges, self.layer_id, self.tried)


class Link:
    """A session with one replica.

    `reads` holds what was asked for, by the sequence of the first of those asked together.
    `applied` is the sequence up to which the replica has answered writes.
    """

    __slots__ = (
        "address",
        "applied",
        "behind",
        "calls",
        "confirmed_at",
        "connected",
        "distrusted",
        "errors",
        "failure",
        "hello",
        "is_local",
        "leaving",
        "outbox",
        "promoting",
        "queue",
        "read_now",
        "reads",
        "reads_total",
        "rebuild",
        "repaired_blocks",
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
        self.read_now: Callable[[Reads], None] | None = None  # a local member answers at once
        self.applied = 0
        self.is_local = address.startswith("dir:")  # in this process: it cannot be late
        self.confirmed_at = float("-inf")  # when the last answered ping was sent
        self.behind = False  # what it lacks is just being repeated (catchup.py)
        self.promoting = False  # the record may call it IN_SYNC already
        self.reads: dict[int, Reads] = {}
        self.calls: dict[int, tuple[int, Reply]] = {}  # expected answer and who gets it
        self.rebuild: Rebuild | None = None
        self.reads_total = 0
        self.errors = 0
        self.repaired_blocks = 0

    def take_answered(self, first: int, count: int) -> Reads:
        """Remove and return the reads with these sequences; WireError if not asked together."""
        reads = self.reads.pop(first, None) or self._split_at(first)
        if reads is None:
            raise wire.WireError(f"an answer to a read never asked (sequence {first})")
        asked = len(reads.cookies)
        if count != asked:
            if not 0 < count < asked:
                self.reads[first] = reads
                raise wire.WireError(f"{count} reads answered, {asked} were asked")
            self.reads[first + count] = reads.part(count, asked)
            reads = reads.part(0, count)
        return reads

    def has_asked(self, sequence: int) -> bool:
        """Is this the number of a read that was not answered yet?"""
        return any(
            first <= sequence < first + len(reads.cookies) for first, reads in self.reads.items()
        )

    def _split_at(self, sequence: int) -> Reads | None:
        """The reads from `sequence` on of those asked together with it; the others stay."""
        for first, reads in self.reads.items():
            if first < sequence < first + len(reads.cookies):
                self.reads[first] = reads.part(0, sequence - first)
                return reads.part(sequence - first, len(reads.cookies))
        return None

    def fail_calls(self, error: BlockdError) -> None:
        """Answer every outstanding call with `error`."""
        calls, self.calls = self.calls, {}
        for _, reply in calls.values():
            reply(0, None, error)
