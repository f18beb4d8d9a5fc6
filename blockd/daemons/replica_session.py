"""One connection to a replica daemon: frames in, storage calls, frames out. The hot path.

Called by the loop when the socket is ready. A batch is everything one `recv` brought; its answers
leave in one `send`, most of them from one arena, so a read is one `preadv` into the arena and
nothing is copied. WRITE and ZERO of a batch are answered by one APPLIED, reads by one DATA.

Invariants:
- data operations only after FENCE, and only while this session is the newest fenced one
- operations are applied in the order they arrive; a refused write is REFUSED before an APPLIED
  covers it
- a block is stored only if it matches the checksum it came with
- what may block (fdatasync, cold reads) runs in a thread; everything else here
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from operator import add
from typing import TYPE_CHECKING, Any

from blockd.daemons.replica_changes import reach
from blockd.daemons.replica_service import READ_BLOCKS_MAX, next_part
from blockd.daemons.stream import Stream
from protocol import replica as wire
from protocol.checksum import block_checksum, block_checksums
from protocol.errors import (
    BlockdError,
    PeerError,
    StorageError,
)
from protocol.streams import Inbox, Outbox, lazy_buffer
from protocol.units import BLOCK_BYTES

if TYPE_CHECKING:
    from blockd.daemons.replica import ReplicaDaemon

ANSWERS_PER_SEND = 8  # a larger batch is answered in parts, so that both ends work at a time
ARENA_BYTES = 2 << 20  # answers of one batch: two reads of the largest size always fit

_U32 = struct.Struct("<I")


class ReplicaSession(Stream):
    """One peer of the replica daemon."""

    def __init__(self, daemon: ReplicaDaemon, sock: socket.socket) -> None:
        self._daemon = daemon
        self._service = daemon.service
        self._replica = daemon.service.replica
        self._changes = daemon.service.changes
        self._arena = lazy_buffer(ARENA_BYTES)
        self._arena_used = 0
        self._arena_queued = 0
        self._nonces = ("", "")
        self._hello_uuid = ""
        self._proven = False
        self.fenced = False
        super().__init__(daemon.loop, sock, Inbox(), Outbox())

    # ---- socket ---------------------------------------------------------------------------

    def received(self) -> None:
        self._carefully(self._parse)
        inbox = self.inbox
        if self.socket is not None and inbox.end > inbox.start:
            inbox.reserve(wire.needed(inbox.buffer, inbox.start, inbox.end))

    def _parse(self) -> None:
        inbox = self.inbox
        frames: list[wire.Frame] = []
        start = wire.parse(inbox.buffer, inbox.buffer, inbox.start, inbox.end, frames)
        if self.fenced:
            self._batch(frames)
        else:
            for frame in frames:
                self._introduce(frame)
        inbox.take(start)

    def _carefully(self, work: Callable[[], None]) -> None:
        """Do something for the peer and send the answers; what it does wrong ends the session."""
        if self.socket is None:
            return
        try:
            work()
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            # Only the JSON of control messages can do this; the peer is broken, we are not.
            self._refuse(0, wire.WireError(f"a control message is malformed: {error!r}"))
            self.flush()
            self.close(f"a control message is malformed: {error!r}")
            return
        except BlockdError as error:
            self._refuse(0, error)
            self.flush()
            self.close(str(error))
            return
        if self.socket is not None:
            self.flush()

    def flush(self) -> bool:
        """Send what is answered; while the peer takes nothing more, its requests wait."""
        used = self._arena_used
        if used > self._arena_queued:
            self.outbox.queue.append(self._arena[self._arena_queued : used])
            self._arena_queued = used
        sent = super().flush()
        if sent:
            self._arena_used = self._arena_queued = 0
        else:
            self._new_arena()
        return sent

    def lost(self, reason: str) -> None:
        self.close(reason)

    def expire(self) -> None:
        """The time to show the key is over: a silent peer must not keep a place."""
        if not self._proven:
            self.close("the peer did not show the key in time")

    def close(self, reason: str) -> None:
        """End the session."""
        if self.detach():
            if self.fenced:
                self._service.flushing.on_busy.remove(self._busy)
                if self._changes.owner is self:
                    self._changes.new_owner(None)
            self.fenced = False
            self._daemon.session_closed(self, reason)

    # ---- answers --------------------------------------------------------------------------

    def _queue_arena(self) -> None:
        if self._arena_used > self._arena_queued:
            self.outbox.queue.append(self._arena[self._arena_queued : self._arena_used])
            self._arena_queued = self._arena_used

    def _new_arena(self) -> None:
        """The old one stays alive until its last byte is sent."""
        self._arena = lazy_buffer(ARENA_BYTES)
        self._arena_used = self._arena_queued = 0

    def _room(self, count: int) -> int:
        """Where `count` more bytes of the arena begin."""
        if self._arena_used + count > ARENA_BYTES:
            self.flush()
            if self._arena_used:
                self._queue_arena()
                self._new_arena()
        return self._arena_used

    def _answer(self, operation: int, sequence: int) -> None:
        base = self._room(wire.HEADER_BYTES)
        wire.pack_into(self._arena, base, operation, sequence)
        self._arena_used = base + wire.HEADER_BYTES

    def _send(self, message: bytes | memoryview) -> None:
        """An answer that does not come from the arena, in order."""
        self._queue_arena()
        self.outbox.queue.append(message)

    def _refuse(self, sequence: int, error: BlockdError) -> None:
        self._send(wire.refused_frame(sequence, error))

    # ---- introduction ---------------------------------------------------------------------

    def _introduce(self, frame: wire.Frame) -> None:
        operation, _, _, _, sequence, _, payload = frame
        content = wire.json_content(payload)
        if operation == wire.HELLO:
            self._hello(sequence, content)
        elif operation == wire.PROVE and self._nonces[0]:
            self._prove(sequence, content)
        elif operation == wire.FENCE and self._proven:
            self._fence(sequence, content)
        else:
            raise wire.WireError(f"operation {operation} before the session was opened")

    def _hello(self, sequence: int, content: dict[str, Any]) -> None:
        if wire.VERSION not in content.get("versions", []):
            raise PeerError(
                f"the peer speaks wire versions {content.get('versions')}, this replica speaks "
                f"[{wire.VERSION}]; upgrade the older side"
            )
        asked = str(content.get("volume_uuid"))
        self._service.check_volume(asked)
        theirs, ours = str(content.get("nonce")), os.urandom(wire.NONCE_BYTES).hex()
        self._nonces, self._hello_uuid = (theirs, ours), asked
        answer = self._service.describe()
        answer["nonce"] = ours
        answer["proof"] = wire.proof(self._daemon.key, "replica", theirs, ours, asked)
        self._send(wire.json_frame(wire.ANSWER, sequence, answer))

    def _prove(self, sequence: int, content: dict[str, Any]) -> None:
        theirs, ours = self._nonces
        expected = wire.proof(self._daemon.key, "volume", ours, theirs, self._hello_uuid)
        if not wire.same_proof(expected, content.get("proof")):
            raise PeerError("the peer does not know the key of this volume; check --key-file")
        self._proven = True
        self._send(wire.json_frame(wire.ANSWER, sequence, {}))

    def _fence(self, sequence: int, content: dict[str, Any]) -> None:
        self._daemon.fence(self, content)
        self.fenced = True
        self._changes.new_owner(self)
        self._service.flushing.on_busy.append(self._busy)
        self._send(wire.json_frame(wire.ANSWER, sequence, self._service.describe()))

    def _busy(self) -> None:
        self._answer(wire.BUSY, 0)
        self.flush()

    # ---- data -----------------------------------------------------------------------------

    def _batch(self, frames: list[wire.Frame]) -> None:
        """Carry out requests in their order; long batches are answered in parts."""
        applied = changes = behind = 0
        for frame in frames:
            operation, flags, length, offset, sequence, argument, payload = frame
            if operation == wire.WRITE:
                if self._write(length, offset, sequence, payload):
                    applied, behind = sequence, argument
                changes += 1
            elif operation == wire.READ:
                if not (self._changes.parked and self._waits(frame)):
                    self._read(*wire.read_ranges(payload), sequence, argument)
            elif operation == wire.ZERO:
                if self._zero(flags, length, offset, sequence):
                    applied, behind = sequence, argument
                changes += 1
            else:
                if applied:
                    self._applied(applied, behind)
                    applied = changes = 0
                if not (self._changes.parked and self._waits(frame)):
                    self._other(frame)
            if changes == ANSWERS_PER_SEND:
                if applied:
                    self._applied(applied, behind)
                self.flush()
                applied = changes = 0
            if self.socket is None:
                return
        if applied:
            self._applied(applied, behind)

    def _applied(self, sequence: int, behind: int) -> None:
        service = self._service
        service.changes.applied(sequence, behind)
        self._answer(wire.APPLIED, sequence)
        service.worked()

    # ---- a full disk (replica_changes.Owner) ------------------------------------------------

    def full(self, sequence: int, errno: int) -> None:
        self._send(wire.frame(wire.FULL, sequence, argument=errno))

    def room(self, sequence: int) -> None:
        self._answer(wire.APPLIED, sequence)
        self._service.worked()
        self.flush()

    def refused(self, sequence: int, error: BlockdError) -> None:
        self._refuse(sequence, error)
        self.flush()

    def _waits(self, frame: wire.Frame) -> bool:
        """Must a request come after changes that wait? Then it will."""
        operation, flags, length, offset, sequence, argument, payload = frame
        reached = reach(operation, flags, length, offset, argument, payload)
        if reached is None:
            return False
        kept = memoryview(bytes(payload)) if payload is not None else None

        def late() -> None:
            if operation == wire.READ:
                self._read(*wire.read_ranges(kept), sequence, argument)
            else:
                self._other((operation, flags, length, offset, sequence, argument, kept))

        return self._changes.waits(reached[0], lambda: self._carefully(late), reached[1])

    # ---- changes --------------------------------------------------------------------------

    def _check_range(self, offset: int, length: int) -> None:
        if (offset | length) & (BLOCK_BYTES - 1) or not length:
            raise wire.WireError(f"offset {offset} length {length} is not whole blocks")
        if offset + length > self._replica.size_bytes:
            raise wire.WireError(
                f"offset {offset} length {length} ends beyond {self._replica.size_bytes} bytes"
            )

    def _write(self, length: int, offset: int, sequence: int, payload: memoryview | None) -> bool:
        """False: it waits for disk space."""
        self._check_range(offset, length)
        count = length // BLOCK_BYTES
        if payload is None or len(payload) != length + 4 * count:
            raise wire.WireError(f"a write of {length} bytes came with another payload size")
        checksums: tuple[int, ...] | list[int]
        if count == 1:
            data = payload[4:]
            checksum = block_checksum(data)
            if _U32.unpack_from(payload)[0] != checksum:
                raise wire.WireError(f"block at {offset} was damaged on the way")
            checksums = (checksum,)
        else:
            data = payload[4 * count :]
            checksums = block_checksums(data)
            if struct.unpack_from(f"<{count}I", payload) != tuple(checksums):
                raise wire.WireError(f"a block at {offset} of {length} bytes was damaged")
        self._service.writes += 1
        try:
            return self._changes.write(sequence, offset // BLOCK_BYTES, count, data, checksums)
        except BlockdError as error:
            self._service.refused()
            self._refuse(sequence, error)
            return True

    def _zero(self, flags: int, length: int, offset: int, sequence: int) -> bool:
        """False: it waits for disk space, or was done although others wait."""
        self._check_range(offset, length)
        self._service.writes += 1
        keep = bool(flags & wire.KEEP_ALLOCATED)
        first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
        try:
            done = self._changes.zero(sequence, first, count, keep)
        except BlockdError as error:
            self._service.refused()
            self._refuse(sequence, error)
            return True
        if done and self._changes.parked:
            self._send(wire.frame(wire.DONE, sequence))
            return False
        return done

    def _read(self, firsts: list[int], counts: list[int], sequence: int, layer_id: int) -> None:
        """Answer the ranges of one READ in parts, those that are not in memory from a thread."""
        if not 0 < min(counts) <= max(counts) <= READ_BLOCKS_MAX:
            raise wire.WireError(f"reads of {min(counts)} to {max(counts)} blocks")
        if max(map(add, firsts, counts)) > self._replica.block_count:
            raise wire.WireError(f"a read ends beyond {self._replica.size_bytes} bytes")
        self._service.reads += len(counts)
        at = 0
        while at < len(counts) and self.socket is not None:
            if at:
                self.flush()
            part, blocks = next_part(counts, at, ANSWERS_PER_SEND)
            base = self._room(wire.HEADER_BYTES + blocks * (4 + wire.CELL_BYTES))
            start = base + wire.HEADER_BYTES
            done, size = self._replica.read_ranges(
                firsts[at : at + part],
                counts[at : at + part],
                self._arena[start:],
                layer_id,
                wire.HEADROOM_BYTES,
            )
            if done:
                number = sequence + at
                wire.pack_into(
                    self._arena, base, wire.DATA, number, argument=done, payload_bytes=size
                )
                self._arena_used = start + size
            at += done
            if done < part:
                self._read_cold(firsts[at], counts[at], sequence + at, layer_id)
                at += 1

    def _read_cold(self, first: int, count: int, sequence: int, layer_id: int) -> None:
        """Some of it is not in memory: read in a thread."""

        def done(payload: memoryview | None, error: BlockdError | None) -> None:
            if self.socket is None:
                return
            if payload is None:
                self._refuse(sequence, error or StorageError("the read failed"))
            else:
                size = len(payload)
                self._send(wire.frame(wire.DATA, sequence, argument=1, payload_bytes=size))
                self._send(payload)
            self.flush()

        self._service.read_cold(first, count, layer_id, done)

    # ---- everything else ------------------------------------------------------------------

    def _other(self, frame: wire.Frame) -> None:
        operation, _, length, offset, sequence, argument, payload = frame
        try:
            if operation == wire.FLUSH:
                self._service.flush(lambda error: self._flushed(sequence, error), sequence)
            elif operation == wire.STABLE:
                self._service.stable(offset, argument)
            elif operation == wire.PING:
                self._answer(wire.PONG, sequence)
            elif operation == wire.EXTENTS:
                self._extents(length, offset, sequence, argument)
            elif operation == wire.CHANGED:
                self._changed(length, offset, sequence, argument)
            elif operation == wire.CONTROL:
                self._service.control(
                    wire.json_content(payload), self, partial(self._controlled, sequence)
                )
            elif operation in (wire.LAYER_READ, wire.LAYER_HASH, wire.LAYER_WRITE, wire.MEND):
                self._copying(frame)
            else:
                raise wire.WireError(f"unknown operation {operation}")
        except wire.WireError:
            raise
        except BlockdError as error:
            self._refuse(sequence, error)

    def _flushed(self, sequence: int, error: BlockdError | None) -> None:
        if self.socket is None:
            return
        if error is None:
            self._answer(wire.FLUSHED, sequence)
        else:
            self._refuse(sequence, error)
        self.flush()

    def _extents(self, length: int, offset: int, sequence: int, layer_id: int) -> None:
        self._check_range(offset, length)
        runs = self._replica.extents(offset // BLOCK_BYTES, length // BLOCK_BYTES, layer_id)
        self._send(wire.extents_frame(sequence, runs))

    def _changed(self, length: int, offset: int, sequence: int, layer_id: int) -> None:
        _, base_id, first, _ = wire.place_of(0, offset, 0)
        self._check_range(first * BLOCK_BYTES, length)
        runs = self._replica.differences(first, length // BLOCK_BYTES, base_id, layer_id)
        self._send(wire.extents_frame(sequence, runs))

    def _controlled(self, sequence: int, answer: dict[str, Any] | BlockdError) -> None:
        """The answer to a CONTROL, at once or later."""
        if self.socket is None:
            return
        if isinstance(answer, BlockdError):
            self._refuse(sequence, answer)
        else:
            self._send(wire.json_frame(wire.ANSWER, sequence, answer))
        self.flush()

    def _copying(self, frame: wire.Frame) -> None:
        """Blocks of logical layers, for a rebuild (replica_copying.py)."""
        operation, flags, length, offset, sequence, argument, payload = frame
        copying, place = self._service.copying, wire.place_of(flags, offset, argument)
        if operation == wire.LAYER_WRITE:
            copying.write(place, payload)
            self._send(wire.json_frame(wire.ANSWER, sequence, {}))
        elif operation == wire.MEND:
            mended = copying.mend(place, payload)
            self._send(wire.json_frame(wire.ANSWER, sequence, {"mended": mended}))
        elif operation == wire.LAYER_READ:
            copying.read(place, partial(self._copied, frame, wire.LAYER_DATA))
        else:
            answer = partial(self._copied, frame, wire.LAYER_DIGESTS)
            copying.digests(place, answer, from_disk=bool(length))

    def _copied(
        self,
        asked: wire.Frame,
        answer: int,
        payload: memoryview | None,
        error: BlockdError | None,
    ) -> None:
        if self.socket is None:
            return
        _, count, _, offset, sequence, argument, _ = asked
        if payload is None:
            self._refuse(sequence, error or StorageError("the read failed"))
        elif answer == wire.LAYER_DIGESTS:
            self._send(wire.covered_frame(answer, sequence, bytes(payload)))
        else:
            head = wire.map_frame(
                answer, sequence, payload, count, offset=offset, argument=argument
            )
            self._send(head)
            self._send(payload)
        self.flush()
