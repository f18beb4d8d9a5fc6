"""A replica in a directory of this machine, served inside the volume daemon itself.

`--replica dir:PATH` saves the second process and the socket in between: for a volume with one
replica that is the whole data path. To the engine it is a member like any other: it takes what the
engine queued on its link and answers with the same frames; only the bytes in between are missing.
Reads are not even queued (`read_now`). If the process dies, the replica recovers like one whose own
daemon died.

The answers to a batch are given before `flush` returns, except FLUSH and reads that miss the page
cache, which run in a thread. Data lies in an arena that is used again when no client has unsent
answers.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any

from blockd.daemons.replica_changes import reach
from blockd.daemons.replica_service import ReplicaService, next_part
from blockd.loop import Loop
from protocol import replica as wire
from protocol.errors import BlockdError, StorageError
from protocol.streams import lazy_buffer
from protocol.units import BLOCK_BYTES
from snapshots.replica import Replica

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon
    from replication.link import Link, Reads

ARENA_BYTES = 2 << 20  # data of one batch of reads; one read of the largest size always fits
CELLS = 128  # single blocks that are read without making a view of memory for each
_Fields = tuple[int, int, int, int, int, int, memoryview]
"""operation, flags, length, offset, sequence, argument, control payload"""


class LocalSession:
    """The introduction to a local replica; has the shape of `handshake.Session`."""

    def __init__(self, loop: Loop, path: str, volume_uuid: str) -> None:
        self.address = f"dir:{path}"
        self.service = ReplicaService(loop, Replica.open(path))
        try:
            self.service.check_volume(volume_uuid)
        except BlockdError:
            self.close()
            raise
        self.hello = self.service.describe()

    def fence(self, content: dict[str, Any]) -> dict[str, Any]:
        """Promise an epoch. Older sessions cannot exist: the directory has one owner."""
        self.service.promise(content)
        return self.service.describe()

    def ask(self, operation: int, content: dict[str, Any]) -> dict[str, Any]:
        """A CONTROL or FLUSH before the volume is served."""
        if operation == wire.FLUSH:
            self.service.replica.flush()
            return {}
        answers: list[dict[str, Any] | BlockdError] = []
        self.service.control(content, self, answers.append)
        (answer,) = answers  # what is asked before the volume is served is answered at once
        if isinstance(answer, BlockdError):
            raise answer
        return answer

    def close(self) -> None:
        """Close the directory cleanly."""
        self.service.close()


class LocalMember:
    """A member without a socket; has the shape of `member_socket.MemberSocket`."""

    def __init__(self, daemon: VolumeDaemon, link: Link, session: LocalSession) -> None:
        self.link = link
        link.read_now = self.read_now
        session.service.changes.new_owner(self)
        self._daemon = daemon
        self._service = session.service
        self._replica = session.service.replica
        self._arena = lazy_buffer(ARENA_BYTES)
        self._used = 0
        self._cells = lazy_buffer(CELLS * wire.CELL_BYTES)
        self._cells_used = 0
        self._vectors = [
            (self._cells[end - BLOCK_BYTES : end],)
            for end in range(wire.CELL_BYTES, len(self._cells) + 1, wire.CELL_BYTES)
        ]
        self._answers: list[wire.Frame] | None = None  # those of the batch that is running
        self._open = True

    @property
    def is_open(self) -> bool:
        """False once `close` was called."""
        return self._open

    def flush(self) -> bool:
        """Carry out everything queued and hand the answers to the engine."""
        queue = self.link.queue
        while queue and self._open:
            messages, queue[:] = list(queue), []
            self._deliver(self._batch(messages))
        return True

    def _deliver(self, answers: list[wire.Frame]) -> None:
        if self._open and answers:
            self._daemon.engine.received(self.link, answers)

    def _batch(self, messages: list[Any]) -> list[wire.Frame]:
        answers: list[wire.Frame] = []
        self._answers = answers
        applied = behind = index = 0
        service, changes = self._service, self._service.changes
        while index < len(messages):
            head = messages[index]
            index += 1
            operation, flags, length, offset, sequence, argument, size = wire.fields(head)
            try:
                if operation == wire.WRITE:
                    service.writes += 1
                    data = messages[index]
                    index += 1
                    blocks = length >> 12
                    entries = struct.unpack_from(f"<{blocks}I", head, wire.HEADER_BYTES)
                    if changes.write(sequence, offset >> 12, blocks, data, entries):
                        applied, behind = sequence, argument
                    continue
                left = size + wire.HEADER_BYTES - len(head)
                parts = []
                while left > 0:
                    parts.append(messages[index])
                    left -= len(messages[index])
                    index += 1
                if operation == wire.ZERO:
                    keep = bool(flags & wire.KEEP_ALLOCATED)
                    if changes.zero(sequence, offset >> 12, length >> 12, keep):
                        if changes.parked:
                            answers.append((wire.DONE, 0, 0, 0, sequence, 0, None))
                        else:
                            applied, behind = sequence, argument
                else:
                    content = memoryview(head)[wire.HEADER_BYTES :]
                    fields = (operation, flags, length, offset, sequence, argument, content)
                    if not (changes.parked and self._waits(fields, parts)):
                        self._other(*fields, answers, parts)
            except BlockdError as error:
                if operation in (wire.WRITE, wire.ZERO):
                    self._service.refused()
                    applied, behind = sequence, argument
                answers.append(_refused(sequence, error))
        if applied:
            changes.applied(applied, behind)
            answers.append((wire.APPLIED, 0, 0, 0, applied, 0, None))
            self._service.worked()
        self._answers = None
        return answers

    def _waits(self, fields: _Fields, parts: list[Any]) -> bool:
        """Must a request come after changes that wait? Then it will."""
        operation, flags, length, offset, sequence, argument, content = fields
        reached = reach(operation, flags, length, offset, argument, content)
        kept = [bytes(part) for part in parts]

        def late() -> None:
            answers: list[wire.Frame] = []
            try:
                self._other(*fields, answers, kept)
            except BlockdError as error:
                answers.append(_refused(sequence, error))
            self._deliver(answers)
            self._daemon.send_everything()

        return reached is not None and self._service.changes.waits(reached[0], late, reached[1])

    def read_now(self, reads: Reads) -> None:
        """Answer reads at once, those that are not in memory from a thread."""
        if self.link.queue:
            self.flush()  # what was queued before must be seen
        changes = self._service.changes
        if changes.parked and not reads.layer_id:
            count = len(reads.cookies)
            number = self._daemon.engine.remember(self.link, reads)

            def late() -> None:
                self.read_now(self.link.take_answered(number, count))
                self._daemon.send_everything()

            if changes.waits(list(zip(reads.firsts, reads.counts, strict=True)), late):
                return
            self.link.take_answered(number, count)
        left: Reads | None = reads
        while left is not None:
            left = self._read(left)

    def _read(self, reads: Reads) -> Reads | None:
        """Answer some reads, at least one; the others."""
        total = len(reads.counts)
        waiting = self._daemon.answers_waiting()
        done = self._read_blocks(reads, self._cells_used if waiting else 0)
        if done:
            self._service.reads += done
            return None if done == total else reads.part(done, total)
        part, blocks = next_part(reads.counts, 0, wire.READS_MAX)
        asked = reads if part == total else reads.part(0, part)
        room = blocks * (4 + BLOCK_BYTES) + part * wire.HEADROOM_BYTES
        start = self._used if waiting else 0
        if start + room > len(self._arena):
            self._arena = lazy_buffer(max(room, ARENA_BYTES))  # the old one is still being sent
            start = 0
        target = self._arena[start:]
        done, used = self._replica.read_ranges(
            asked.firsts, asked.counts, target, asked.layer_id, wire.HEADROOM_BYTES
        )
        self._used = start + used
        self._service.reads += part
        if done:
            self._daemon.engine.deliver(self.link, reads.part(0, done), target[:used])
        if done < part:
            self._read_cold(reads.part(done, done + 1))
            done += 1
        return reads.part(done, total) if done < total else None

    def _read_blocks(self, reads: Reads, cell: int) -> int:
        """Answer reads of single blocks, the most frequent case; how many from the first on."""
        counts = reads.counts
        total = len(counts)
        if reads.layer_id or sum(counts) != total or cell + total > CELLS:
            return 0
        vectors = self._vectors[cell : cell + total]
        entries = self._replica.read_blocks(reads.firsts, vectors)
        done = len(entries)
        if not done:
            return 0
        if done < total:
            reads = reads.part(0, done)
        self._cells_used = cell + done
        cells = self._cells[cell * wire.CELL_BYTES : self._cells_used * wire.CELL_BYTES]
        blocks = [vector[0] for vector in vectors[:done]]
        engine = self._daemon.engine
        return done if engine.deliver_blocks(self.link, reads, entries, blocks, cells) else 0

    def _read_cold(self, reads: Reads) -> None:
        """Some of it is not in memory: read in a thread."""
        sequence = self._daemon.engine.remember(self.link, reads)

        def done(payload: memoryview | None, error: BlockdError | None) -> None:
            if payload is None:
                self._later(_refused(sequence, error or StorageError("the read failed")))
            else:
                self._later((wire.DATA, 0, 0, 0, sequence, 1, payload))

        self._service.read_cold(reads.firsts[0], reads.counts[0], reads.layer_id, done)

    def full(self, sequence: int, errno: int) -> None:
        self._service.loop.post(lambda: self._later((wire.FULL, 0, 0, 0, sequence, errno, None)))

    def room(self, sequence: int) -> None:
        self._later((wire.APPLIED, 0, 0, 0, sequence, 0, None))

    def refused(self, sequence: int, error: BlockdError) -> None:
        self._later(_refused(sequence, error))

    def _later(self, answer: wire.Frame) -> None:
        """Deliver an answer that comes after its batch."""
        self._deliver([answer])
        self._daemon.send_everything()

    def _other(
        self,
        operation: int,
        flags: int,
        length: int,
        offset: int,
        sequence: int,
        argument: int,
        content: memoryview,
        answers: list[wire.Frame],
        parts: list[Any],
    ) -> None:
        if operation == wire.FLUSH:
            post = self._service.loop.post  # never in the middle of a batch
            self._service.flush(
                lambda error: post(lambda: self._later(_flushed(sequence, error))), sequence
            )
            return
        if operation == wire.STABLE:
            self._service.stable(offset, argument)
            return
        if operation == wire.PING:
            answers.append((wire.PONG, 0, 0, 0, sequence, 0, None))
            return
        later = partial(self._answer_later, operation, length, offset, sequence, argument)
        copying, place = self._service.copying, wire.place_of(flags, offset, argument)
        if operation == wire.CONTROL:
            self._service.control(
                wire.json_content(content), self, partial(self._controlled, answers, sequence)
            )
            return
        if operation == wire.LAYER_READ:
            copying.read(place, later)
            return
        if operation == wire.LAYER_HASH:
            copying.digests(place, later, from_disk=bool(length))
            return
        payload: bytes | memoryview = b"{}"
        answer = wire.ANSWERS[operation]
        if operation == wire.EXTENTS:
            runs = self._replica.extents(offset >> 12, length >> 12, argument)
            payload = wire.extents_frame(sequence, runs)[wire.HEADER_BYTES :]
        elif operation == wire.CHANGED:
            _, base_id, first, _ = wire.place_of(0, offset, 0)
            runs = self._replica.differences(first, length >> 12, base_id, argument)
            payload = wire.extents_frame(sequence, runs)[wire.HEADER_BYTES :]
        elif operation == wire.LAYER_WRITE:
            copying.write(place, memoryview(parts[0]))
        elif operation == wire.MEND:
            mended = copying.mend(place, memoryview(parts[0]))
            payload = wire.json_frame(answer, sequence, {"mended": mended})[wire.HEADER_BYTES :]
        else:
            raise AssertionError(f"operation {operation} is not for members")
        answers.append((answer, 0, 0, offset, sequence, 0, memoryview(payload)))

    def _controlled(
        self, answers: list[wire.Frame], sequence: int, answer: dict[str, Any] | BlockdError
    ) -> None:
        """The answer to a CONTROL: with its batch if that is still running, else by itself."""
        if isinstance(answer, BlockdError):
            frame = _refused(sequence, answer)
        else:
            payload = wire.json_frame(wire.ANSWER, sequence, answer)[wire.HEADER_BYTES :]
            frame = (wire.ANSWER, 0, 0, 0, sequence, 0, memoryview(payload))
        if answers is self._answers:
            answers.append(frame)
        else:
            self._later(frame)

    def _answer_later(
        self,
        operation: int,
        length: int,
        offset: int,
        sequence: int,
        argument: int,
        payload: memoryview | None,
        error: BlockdError | None,
    ) -> None:
        if payload is None:
            self._later(_refused(sequence, error or StorageError("the read failed")))
        else:
            self._later((wire.ANSWERS[operation], 0, 0, offset, sequence, argument, payload))

    def close(self) -> bool:
        """The engine is done with this member: close the directory. False if not cleanly."""
        if not self._open:
            return True
        self._open = False
        self.link.queue.clear()
        return self._service.close()


def _refused(sequence: int, error: BlockdError) -> wire.Frame:
    payload = memoryview(wire.refused_frame(sequence, error))[wire.HEADER_BYTES :]
    return (wire.REFUSED, 0, 0, 0, sequence, error.errno, payload)


def _flushed(sequence: int, error: BlockdError | None) -> wire.Frame:
    if error is not None:
        return _refused(sequence, error)
    return (wire.FLUSHED, 0, 0, 0, sequence, 0, None)
