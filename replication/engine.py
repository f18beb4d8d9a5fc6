"""The volume: requests in, one order for all members, answers out. The hot path.

A front end calls `read`, `write`, `zero`, `flush`, `extents`; the owner of the replica sockets
calls `received` with the frames of one batch. Nothing here blocks and nothing here owns a socket:
what has to leave waits in the links' outboxes.

The order. Every change gets the next sequence number and is queued on all targets (IN_SYNC and
SYNCING members) at once. Links are first in, first out and replicas apply in order, so all members
see one order, and a read queued on any link sees every write queued before it.

Invariants (numbers are the replication rules of ARCHITECTURE.md):
- a write is answered only when every target answered it: pending[0].sequence > min(applied)  (2)
- a target leaves `targets` only after the record says OUT; until then it holds answers back  (3)
- the last IN_SYNC member is never OUT; without it I/O fails with EIO and the state says so    (3)
- FLUSH is queued behind every write answered before it, on every target                       (5)
- sequence numbers only grow; pending is ordered by them                                       (8)
- data is returned only if every block matches its checksum                                   (13)
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError, PeerError, StorageError, from_code
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication import membership, pieces
from replication.answers import extent_runs
from replication.authority import IN_SYNC, Record
from replication.ledger import Ledger
from replication.link import Link, Reply
from replication.pace import Latency
from replication.ranges import RangeLocks
from replication.reading import Client, Reading
from replication.room import Room
from replication.turns import Turns
from replication.walks import Walks

if TYPE_CHECKING:
    from replication.rebuild import Rebuild
    from replication.scrub import Scrub

EXTENTS_BLOCKS_MAX = 1 << 18  # 1 GiB described by one answer; the client asks for the rest

_MASK = BLOCK_BYTES - 1
_BEHIND_MAX = 0xFFFFFFFF  # fits the frame; nobody is behind that far


class Engine(Reading):
    """One open volume."""

    def __init__(self, ledger: Ledger, now: Callable[[], float]) -> None:
        self.ledger = ledger
        self.now = now
        super().__init__(self)
        self.links: dict[str, Link] = {}
        self.targets: list[Link] = []
        self.locks = RangeLocks()
        self.pending: deque[tuple[int, Client, Any, bool]] = deque()
        self.flushes: list[_Flush] = []
        self.changes = Turns()
        self.walks = Walks(self)
        self.rebuilds: set[Rebuild] = set()  # under way
        self.scrub: Scrub | None = None  # under way
        self.room = Room(self)
        self.latency = Latency(now)
        self._sampled = (0, 0.0)  # sequence and beginning of the write that is a sample, or 0
        self.paused = False  # the disk of a member is full: writes wait in `room`
        self.suspended = False  # fewer members in sync than the volume wants: nothing is answered
        self.all_applied = 0  # every target has applied everything up to this sequence
        self.on_lost: Callable[[Link, str], None] = lambda link, reason: None
        self.on_members: Callable[[], None] = lambda: None
        self.writes_total = self.zeros_total = self.flushes_total = self.written_bytes = 0
        self._queues: list[list[Any]] = []

    @property
    def record(self) -> Record:
        """The newest record of the volume."""
        return self.ledger.record

    # ---- requests -------------------------------------------------------------------------

    def write(self, client: Client, cookie: Any, offset: int, data: memoryview, fua: bool) -> None:
        """Write any byte range; answered when every target applied it."""
        length = len(data)
        if self.paused:
            kept = memoryview(bytes(data))
            self.room.wait(lambda: self.write(client, cookie, offset, kept, fua), length)
            return
        self.writes_total += 1
        self.written_bytes += length
        if (offset | length) & _MASK:
            pieces.write_partial(self, client, cookie, offset, data, fua)
        elif self.locks.held and self.locks.blocks(
            offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES
        ):
            kept = memoryview(bytes(data))
            self.locks.wait(
                offset // BLOCK_BYTES,
                (offset + length) // BLOCK_BYTES,
                lambda: self.send_write(client, cookie, offset, kept, fua),
            )
        else:
            self.send_write(client, cookie, offset, data, fua)

    def send_write(
        self, client: Client, cookie: Any, offset: int, data: memoryview, fua: bool
    ) -> None:
        """Queue a write of whole blocks on every target; the range is not locked by others."""
        if len(data) > PIECE_BYTES_MAX:
            pieces.write_long(self, client, cookie, offset, data, fua)
            return
        if not self.targets:
            client.done(cookie, errno.EIO)
            return
        self.sequence = sequence = self.sequence + 1
        behind = min(sequence - self.all_applied, _BEHIND_MAX)
        head = wire.write_header(sequence, offset, data, behind)
        for queue in self._queues:
            queue.append(head)
            queue.append(data)
        self.pending.append((sequence, client, cookie, fua))
        if self.latency.wanted and not self._sampled[0]:
            self._sampled = (sequence, self.now())

    def zero(
        self, client: Client, cookie: Any, offset: int, length: int, keep: bool, fua: bool
    ) -> None:
        """Make a byte range read as zeros and, unless `keep`, give its space back."""
        self.zeros_total += 1
        if (offset | length) & _MASK:
            pieces.zero_partial(self, client, cookie, offset, length, keep, fua)
        elif self.locks.held and self.locks.blocks(
            offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES
        ):
            self.locks.wait(
                offset // BLOCK_BYTES,
                (offset + length) // BLOCK_BYTES,
                lambda: self.send_zero(client, cookie, offset, length, keep, fua),
            )
        else:
            self.send_zero(client, cookie, offset, length, keep, fua)

    def send_zero(
        self, client: Client, cookie: Any, offset: int, length: int, keep: bool, fua: bool
    ) -> None:
        """Queue a ZERO of whole blocks on every target; the range is not locked by others."""
        if length > pieces.ZERO_STEP_BYTES:
            pieces.zero_long(self, client, cookie, offset, length, keep, fua)
            return
        if not self.targets:
            client.done(cookie, errno.EIO)
            return
        self.sequence = sequence = self.sequence + 1
        flags = wire.KEEP_ALLOCATED if keep else 0
        behind = min(sequence - self.all_applied, _BEHIND_MAX)
        message = wire.frame(
            wire.ZERO, sequence, length=length, offset=offset, flags=flags, argument=behind
        )
        for queue in self._queues:
            queue.append(message)
        self.pending.append((sequence, client, cookie, fua))

    def extents(
        self,
        client: Client,
        cookie: Any,
        offset: int,
        length: int,
        layer_id: int = 0,
        base_id: int | None = None,
    ) -> None:
        """Ask one member which blocks of a range hold data, or may differ from layer `base_id`."""
        if not self.readers:
            client.done(cookie, errno.EIO)
            return
        first = offset & ~_MASK
        stop = min((offset + length + _MASK) & ~_MASK, first + EXTENTS_BLOCKS_MAX * BLOCK_BYTES)
        link = self.reader or self.readers[0]

        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is not None or payload is None:
                if link.connected:
                    client.done(cookie, errno.EIO)
                else:  # the member went away: ask another one
                    self.extents(client, cookie, offset, length, layer_id, base_id)
                return
            client.extents(cookie, extent_runs(payload, (stop - first) // BLOCK_BYTES))

        if base_id is None:
            operation, place = wire.EXTENTS, first
        else:
            operation, place = wire.CHANGED, wire.place(base_id, first // BLOCK_BYTES)
        self.call(link, operation, reply, offset=place, length=stop - first, argument=layer_id)

    def flush(self, client: Client, cookie: Any) -> None:
        """Make every write answered so far durable on every target."""
        self.flushes_total += 1
        self._answer_after_flush(client, cookie)

    def flush_then(
        self, done: Callable[[BlockdError | None], None], *, for_client: bool = False
    ) -> None:
        """Flush all targets, then `done(None)`, or `done(error)` if the last copy failed.

        A client's flush waits while the volume is suspended; a rebuild's must not, because it is
        what ends that.
        """
        if not self.readers:
            done(StorageError("no replica in sync is reachable"))
            return
        flush = _Flush(set(self.targets), done, for_client)
        self.flushes.append(flush)
        for link in list(self.targets):
            self._flush_one(flush, link)

    def _flush_one(self, flush: _Flush, link: Link) -> None:
        def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            self._flushed(flush, link, error)

        self.call(link, wire.FLUSH, reply)
        flush.asked[link] = self.sequence

    def _flushed(self, flush: _Flush, link: Link, error: BlockdError | None) -> None:
        if error is not None:
            # Never retried and believed: the member goes OUT, which ends its part of the flush;
            # the last one cannot go OUT, so its failure is the answer.
            if link.connected:
                link.distrusted = error.errno != errno.ENOSPC
                self.fail(link, f"flush failed: {error}")
            return
        flush.waiting.discard(link)
        self._finish_flush(flush)

    def _finish_flush(self, flush: _Flush, error: BlockdError | None = None) -> None:
        if error is None and not self.targets:
            error = StorageError("the last replica in sync is gone")  # nobody has made it durable
        if self.suspended and error is None and flush.for_client:
            return  # until there are enough members again
        if flush in self.flushes and (error is not None or not flush.waiting):
            self.flushes.remove(flush)
            if error is None:
                self._tell_stable(flush)
            flush.done(error)

    def _tell_stable(self, flush: _Flush) -> None:
        """Every target has made it durable: they need not remember what they wrote before it."""
        applied = min((link.applied for link in self.targets), default=0)
        owed = next((entry[0] for entry in self.pending if entry[0] > applied), None)
        if owed is not None and owed < max(flush.asked.values(), default=0):
            return  # a full member flushes past changes that wait for space there
        config_seq = self.record.config_seq
        for link in self.targets:
            if link.connected and link in flush.asked:
                link.queue.append(
                    wire.frame(wire.STABLE, 0, offset=flush.asked[link], argument=config_seq)
                )

    # ---- calls to one or all members ------------------------------------------------------

    def call(
        self,
        link: Link,
        operation: int,
        reply: Reply,
        *,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        argument: int = 0,
        content: dict[str, Any] | None = None,
        payload: Sequence[memoryview] = (),
    ) -> None:
        """Queue one request that is answered on its own; `length` as the operation defines it."""
        if not link.connected:
            reply(0, None, PeerError(f"replica {link.replica_uuid} is not connected"))
            return
        self.sequence += 1
        link.calls[self.sequence] = (wire.ANSWERS[operation], reply)
        if content is not None:
            link.queue.append(wire.json_frame(operation, self.sequence, content))
            return
        link.queue.append(
            wire.frame(
                operation,
                self.sequence,
                flags=flags,
                length=length,
                offset=offset,
                argument=argument,
                payload_bytes=sum(map(len, payload)),
            )
        )
        link.queue.extend(payload)

    # ---- answers --------------------------------------------------------------------------

    def received(self, link: Link, frames: list[wire.Frame]) -> None:
        """Handle one batch of frames from a member."""
        for operation, _, _, _, sequence, argument, payload in frames:
            if operation == wire.DATA:
                self.answered(link, sequence, argument, payload)
            elif operation == wire.APPLIED:
                if not link.applied <= sequence <= self.sequence:
                    raise wire.WireError(f"applied sequence {sequence} is out of order")
                link.applied = sequence
                if self.paused:
                    self.room.applied(link)
            elif operation == wire.FULL:
                self.room.is_full(link, sequence)
            elif operation == wire.DONE:
                self.room.done_early(link, sequence)
            elif operation != wire.BUSY:
                if operation == wire.REFUSED:
                    self._refused(link, sequence, argument, payload)
                else:
                    self._replied(link, operation, sequence, argument, payload)
                if not link.connected:
                    break  # it failed by this; what it asked and answered counts no more
        self.advance()

    def _replied(
        self,
        link: Link,
        operation: int,
        sequence: int,
        argument: int,
        payload: memoryview | None,
    ) -> None:
        call = link.calls.pop(sequence, None)
        if call is None or call[0] != operation:
            if call is not None:
                link.calls[sequence] = call
            raise wire.WireError(f"answer {operation} to something else (sequence {sequence})")
        reply = call[1]
        try:
            reply(argument, payload, None)
        except (
            wire.WireError,
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
        ) as error:
            # The asker found another content than it asked for: the peer's fault. The call fails
            # with the link.
            nonsense = wire.WireError(f"an answer that makes no sense: {error!r}")
            if link.connected:
                link.calls[sequence] = call
                raise nonsense from error
            reply(0, None, nonsense)

    def _refused(self, link: Link, sequence: int, code: int, payload: memoryview | None) -> None:
        content = wire.json_content(payload)
        if link.has_asked(sequence):
            read = link.take_answered(sequence, 1)
            if content.get("code") == StorageError.code:
                self.bad_answer(link, read)
            else:
                self.read_elsewhere(link, read)
            return
        call = link.calls.pop(sequence, None)
        if call is not None:
            error = from_code(str(content.get("code")), str(content.get("message")))
            error.errno = code or errno.EIO
            call[1](0, None, error)
            return
        link.errors += 1
        self.fail(link, f"write refused: {content.get('message')}")

    def advance(self) -> None:
        """Answer every write that all targets applied."""
        pending = self.pending
        if not self.targets:
            return
        applied = self.all_applied = min([link.applied for link in self.targets])
        if self.suspended:
            return
        if self._sampled[0] and self._sampled[0] <= applied:
            began, self._sampled = self._sampled[1], (0, 0.0)
            self.latency.wanted = False
            self.latency.sample(began)
        while pending and pending[0][0] <= applied:
            self.answer(pending.popleft())
        if self.paused:
            self.room.answer_early()

    def answer(self, entry: tuple[int, Client, Any, bool]) -> None:
        """A change was applied by every target."""
        _, client, cookie, fua = entry
        if fua:
            self._answer_after_flush(client, cookie)
        else:
            client.done(cookie, 0)

    def _answer_after_flush(self, client: Client, cookie: Any) -> None:
        self.flush_then(
            lambda error: client.done(cookie, error.errno if error else 0), for_client=True
        )

    # ---- members --------------------------------------------------------------------------

    def fail(self, link: Link, reason: str) -> None:
        """A member broke, refused a write or went away."""
        membership.fail(self, link, reason)

    def count_in_sync(self) -> None:
        """Nothing is answered while fewer members are in sync than the volume wants."""
        in_sync = sum(1 for link in self.targets if link.state == IN_SYNC)
        self.suspended = 0 < in_sync < self.record.min_in_sync

    def set_members(self, targets: list[Link], readers: list[Link]) -> None:
        """Who gets writes and who may be read, from the next request on."""
        self.targets = targets
        self.set_readers(readers)
        self._queues = [link.queue for link in targets]
        self.count_in_sync()
        self.lease.members_changed()
        for flush in list(self.flushes):
            flush.waiting.intersection_update(targets)
            self._finish_flush(flush)
        self.advance()
        self.room.members_changed()
        self.on_members()

    def fail_all(self, code: int) -> None:
        """The last copy is gone: answer everything outstanding with `code`."""
        self.targets, self._queues, self._sampled = [], [], (0, 0.0)
        self.set_readers([])
        pending = list(self.pending)
        self.pending.clear()
        for _, client, cookie, _ in pending:
            client.done(cookie, code)
        for reads in self.lease.fail_waiting():
            for cookie in reads.cookies:
                reads.client.done(cookie, code)
        for flush in list(self.flushes):
            self._finish_flush(flush, StorageError("the last replica in sync is gone"))


class _Flush:
    """One FLUSH and the targets that have not done it yet."""

    __slots__ = ("asked", "done", "for_client", "waiting")

    def __init__(
        self, waiting: set[Link], done: Callable[[BlockdError | None], None], for_client: bool
    ) -> None:
        self.waiting = waiting
        self.for_client = for_client
        self.asked: dict[Link, int] = {}  # sequence of the FLUSH each was sent
        self.done = done
