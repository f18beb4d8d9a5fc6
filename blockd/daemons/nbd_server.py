"""NBD connections of a volume daemon: bytes to engine requests, engine answers to bytes.

The hot path of the front end. A batch is everything one `recv` brought; the engine queues its
requests on the members, the owner sends them, and answers leave in one `sendmsg` when the members
have answered. Payloads are slices of the receive buffer and of the members' receive buffers.

Invariants:
- every request is answered exactly once, with its own cookie, while the connection lives
- a slice of the receive buffer is handed on only until the batch ends; if a member has not taken
  it by then, the buffer is left to it and the connection goes on in a fresh one
- a client that does not read its answers is not read from
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockd.daemons import addresses, process
from blockd.daemons.block_status import BlockStatus
from blockd.daemons.stream import Stream
from blockd.loop import READ, Timer
from protocol import replica as wire
from protocol.errors import PeerError, StateError
from protocol.nbd import constants as nbd
from protocol.nbd import replies, requests
from protocol.nbd.exports import Export
from protocol.nbd.handshake import TRANSMISSION, Handshake
from protocol.streams import Inbox, Outbox
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon
    from replication.answers import Chunks

READING_BYTES_MAX = 64 << 20  # two reads of the largest size; later requests of a client wait
_MASK = BLOCK_BYTES - 1
assert wire.HEADROOM_BYTES == replies.DATA_HEADER_BYTES
_ZERO = memoryview(bytes(1 << 20))  # what holes look like to clients without structured replies


class NbdServer:
    """One listening address."""

    def __init__(
        self, daemon: VolumeDaemon, address: str, sock: socket.socket | None = None
    ) -> None:
        """Listen at `address`, or go on with `sock`, which does already."""
        self._daemon = daemon
        self.asked = address
        self.socket, self.address = (sock, address) if sock else daemon.loop.listen(address)
        self.go_on()

    def go_on(self) -> None:
        """Accept clients."""
        self._daemon.loop.register(self.socket.fileno(), READ, self._accept)

    def pause(self) -> None:
        """Let new clients wait."""
        self._daemon.loop.unregister(self.socket.fileno())

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self.socket.accept()
        except OSError:
            return
        if len(self._daemon.connections) >= nbd.CONNECTIONS_MAX:
            process.log(f"refused an NBD client: {nbd.CONNECTIONS_MAX} are connected already")
            sock.close()
            return
        sock.setblocking(False)
        addresses.tune(sock)
        connection = NbdConnection(self._daemon, sock, self.address)
        self._daemon.connections.append(connection)
        connection.greet()

    def close(self) -> None:
        """Stop listening; a unix socket file goes away."""
        self._daemon.loop.unregister(self.socket.fileno())
        addresses.close(self.socket)


@dataclass(frozen=True)
class Parting:
    """A connection at a message boundary: what was agreed, and bytes in neither direction lost.

    `unread` came from the client and no request of it was begun; `unsent` are answers that the
    client has not taken. `draining_bytes` of `drained` are still to be skipped. `address` is where
    it came in.
    """

    export: str
    size_bytes: int
    structured: bool
    contexts: tuple[tuple[int, str], ...]
    draining_bytes: int
    drained: requests.Request | None
    unread: bytes
    unsent: bytes
    address: str = ""


class NbdConnection(Stream):
    """One client; also the engine's `Client`. `address`: where it came in."""

    def __init__(self, daemon: VolumeDaemon, sock: socket.socket, address: str) -> None:
        self._daemon = daemon
        self.address = address
        self._engine = daemon.engine
        self._parser = requests.RequestParser()
        super().__init__(daemon.loop, sock, Inbox(), Outbox())
        self._queue = self.outbox.queue
        self._handshake = Handshake(daemon)
        self._transmission = False
        self._structured = False
        self._under_way = 0
        self.reading_bytes = 0  # asked for and not answered
        self.backlog: list[requests.Request] = []
        self.export: Export | None = None
        self.layer_id = 0
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._size_bytes = 0
        self._deadline: Timer | None = None
        self._paused = False

    # ---- socket ---------------------------------------------------------------------------

    def received(self) -> None:
        try:
            if self._transmission:
                self._requests()
            else:
                self._negotiate()
        except PeerError as error:
            self._daemon.send_everything()
            self.close(str(error))

    def ended(self) -> None:
        if not self._under_way:
            self.close("the client said goodbye")

    def lost(self, reason: str) -> None:
        self.close(reason)

    def volume_grew(self, size_bytes: int) -> None:
        """A client of the live volume may use the new part, once it has learned of it."""
        if self.export is not None and not self.layer_id:
            self.export = replace(self.export, size_bytes=size_bytes)
            self._size_bytes = size_bytes

    def close(self, reason: str) -> None:
        """End the connection; answers still to come are dropped."""
        if self.detach():
            if self._deadline is not None:
                self._deadline.cancel()
            self._daemon.connection_closed(self, reason)

    # ---- hand-over to another process -------------------------------------------------------

    def pause(self) -> None:
        """Begin no request until `go_on_again`."""
        self._paused = True
        self.hold()

    def go_on_again(self) -> None:
        """Begin requests again."""
        self._paused = False
        self.flush()
        if not self.backlog and self.inbox.end > self.inbox.start:
            self.received()
        self.go_on()

    @property
    def negotiating(self) -> bool:
        """Has no export been chosen yet?"""
        return not self._transmission

    @property
    def quiet(self) -> bool:
        """Is every request that was begun answered, and can `parting` tell the rest?"""
        if self._under_way or (self.backlog and self._parser.draining_bytes):
            return False
        return all(each[0] != nbd.CMD_WRITE or each[5] is not None for each in self.backlog)

    def parting(self) -> Parting:
        """What another process needs to go on with a paused, quiet connection."""
        assert self.export is not None
        waiting = [requests.pack(request) for request in self.backlog]
        draining_bytes, drained = self._parser.skipping()
        inbox = self.inbox
        return Parting(
            export=self.export.name,
            size_bytes=self._size_bytes,
            structured=self._structured,
            contexts=self._contexts,
            draining_bytes=draining_bytes,
            drained=drained,
            unread=b"".join([*waiting, inbox.buffer[inbox.start : inbox.end]]),
            unsent=b"".join(self._queue),
            address=self.address,
        )

    def resume_from(self, parting: Parting) -> None:
        """Go on where another process stopped; `go_on_again` begins."""
        export = self._daemon.find(parting.export)
        if export is None:
            raise StateError(f"a client uses {parting.export}, which does not exist here")
        self._enter(
            replace(export, size_bytes=parting.size_bytes), parting.structured, parting.contexts
        )
        self._parser.skip(parting.draining_bytes, parting.drained)
        self._put(parting.unread)
        if parting.unsent:
            self._queue.append(parting.unsent)
        self.pause()

    # ---- handshake ------------------------------------------------------------------------

    def greet(self) -> None:
        """Begin the handshake."""
        self._deadline = self.loop.later(nbd.HANDSHAKE_DEADLINE_SECONDS, self._too_slow)
        self._queue.append(self._handshake.greeting)
        self.flush()

    def _too_slow(self) -> None:
        self.close(f"no export was chosen within {nbd.HANDSHAKE_DEADLINE_SECONDS} s")

    def _negotiate(self) -> None:
        inbox, handshake = self.inbox, self._handshake
        data = inbox.buffer[inbox.start : inbox.end]
        inbox.take(inbox.end)
        answer = handshake.receive(data)
        if answer:
            self._queue.append(answer)
        if handshake.state == TRANSMISSION:
            assert handshake.export is not None
            if self._deadline is not None:
                self._deadline.cancel()
            self._enter(handshake.export, handshake.structured_replies, handshake.contexts)
            self._put(handshake.leftover)
            self.flush()
            self._requests()
        elif self.flush() and handshake.state == "closed":
            self.close("the client ended the handshake")

    def _enter(
        self, export: Export, structured: bool, contexts: tuple[tuple[int, str], ...]
    ) -> None:
        """Requests come from now on."""
        self.export = export
        self._size_bytes = export.size_bytes
        self.layer_id = self._daemon.layer_of(export.name)
        self._structured = structured
        self._contexts = contexts
        self._transmission = True
        if self._daemon.handing_over:
            self.pause()

    def _put(self, data: bytes) -> None:
        """`data` is what was received."""
        inbox = self.inbox
        inbox.reserve(len(data))
        inbox.buffer[: len(data)] = data
        inbox.start, inbox.end = 0, len(data)

    # ---- requests -------------------------------------------------------------------------

    def _requests(self) -> None:
        if self._paused:
            return  # a client that hung up is heard even so
        inbox, daemon = self.inbox, self._daemon
        batch: list[requests.Request] = []
        reads: list[requests.Request] = []
        plain_end = 0 if daemon.stopping else self._size_bytes  # then every request is looked at
        start = inbox.start
        try:
            start = self._parser.parse(
                inbox.buffer, inbox.buffer, start, inbox.end, batch, reads, plain_end
            )
        finally:
            self._engine.next_turn()
            if batch:
                self._run(batch)
            if reads:
                self._read(reads)
        sent = daemon.send_to_members()
        inbox.take(start, pinned=not sent or bool(self.backlog))
        if inbox.end > inbox.start:
            inbox.reserve(self._parser.needed(inbox.buffer, inbox.start, inbox.end))
        daemon.send_to_clients()
        if daemon.congested:
            self._wait_for_members()

    def resume(self) -> None:
        """The members took what was waiting for them: read on."""
        if not self.backlog and not self._paused:
            self.release()

    def drained(self) -> None:
        self.go_on()

    def go_on(self) -> None:
        """Run what waited for earlier reads to be answered and taken, and read on."""
        if (
            self._paused
            or self.blocked
            or self.reading_bytes > READING_BYTES_MAX // 2
            or self.socket is None
        ):
            return
        batch, self.backlog = self.backlog, []
        if batch:
            self._run(batch)
            self._daemon.send_everything()
        if self.backlog:
            return
        if self._daemon.congested:
            self._wait_for_members()
        else:
            self.release()

    def _wait_for_members(self) -> None:
        """Do not read on until they have taken what waits for them."""
        self.hold()
        if self not in self._daemon.waiting:
            self._daemon.waiting.append(self)

    def _read(self, reads: list[requests.Request]) -> None:
        """Hand plain reads to the engine, together; each request is also its cookie there."""
        counts = [request[4] >> 12 for request in reads]
        length = sum(counts) << 12
        if self.backlog or self.reading_bytes + length > READING_BYTES_MAX:
            self._wait(reads)  # one by one, as answers are taken
            return
        self._under_way += len(reads)
        self.reading_bytes += length
        firsts = [request[3] >> 12 for request in reads]
        self._engine.read_blocks(self, reads, firsts, counts, self.layer_id)

    def _wait(self, batch: list[requests.Request]) -> None:
        """Keep requests until earlier reads are answered and taken."""
        self.backlog += batch
        self.hold()
        self.loop.post(self.go_on)

    def _run(self, batch: list[requests.Request]) -> None:
        """Hand requests to the engine."""
        size, writable = self._size_bytes, not self.layer_id and not self._daemon.stopping
        left = iter(batch)
        for request in left:
            if self.ending:
                return  # what follows a DISC means nothing
            command, flags, _, offset, length, payload = request
            self._under_way += 1
            if (
                command == nbd.CMD_WRITE
                and flags == 0
                and writable
                and 0 < length <= PIECE_BYTES_MAX
                and offset + length <= size
            ):
                assert payload is not None
                self._engine.write(self, request, offset, payload, False)
                continue
            self._run_other(request)
            if self.reading_bytes > READING_BYTES_MAX:
                self._wait(list(left))
                return

    def _run_other(self, request: requests.Request) -> None:
        command, flags, cookie, offset, length, payload = request
        export, contexts = self.export, self._contexts
        assert export is not None
        code = requests.check(command, flags, offset, length, export, self._structured, contexts)
        if self._daemon.stopping and command != nbd.CMD_DISC:
            code = nbd.ESHUTDOWN
        if code:
            self._refuse(cookie, code, requests.describe(command, flags, offset, length, export))
        elif command == nbd.CMD_DISC:
            self._under_way -= 1
            self.ending = True
        elif command == nbd.CMD_FLUSH:
            self._engine.flush(self, request)
        elif not length or command == nbd.CMD_CACHE:
            self._under_way -= 1
            self._succeed(request)
        elif command == nbd.CMD_READ:
            self.reading_bytes += length
            self._engine.read(self, request, offset, length, self.layer_id)
        elif command == nbd.CMD_BLOCK_STATUS:
            structure = self._daemon.structure
            BlockStatus(self, request).ask(self._engine, structure, contexts, self.layer_id)
        elif command == nbd.CMD_WRITE:
            assert payload is not None
            self._engine.write(self, request, offset, payload, bool(flags & nbd.CMD_FLAG_FUA))
        else:
            keep = bool(flags & nbd.CMD_FLAG_NO_HOLE)
            fua = bool(flags & nbd.CMD_FLAG_FUA)
            self._engine.zero(self, request, offset, length, keep, fua)

    def _refuse(self, cookie: int, code: int, message: str) -> None:
        self._under_way -= 1
        self._queue.append(replies.error_reply(cookie, code, self._structured, message))

    # ---- answers (the engine calls these) ---------------------------------------------------

    def done(self, cookie: requests.Request, error: int) -> None:
        self._under_way -= 1
        if cookie[0] == nbd.CMD_READ:
            self.reading_bytes -= cookie[4]
        if error:
            code = replies.error_of(error)
            self._queue.append(replies.error_reply(cookie[2], code, self._structured))
        else:
            self._succeed(cookie)

    def _succeed(self, request: requests.Request) -> None:
        """Answer a request that returns no data."""
        if request[0] == nbd.CMD_READ and self._structured:
            self._queue.append(replies.done_chunk(request[2]))
        else:
            self._queue.append(replies.simple_reply(request[2]))

    def blocks(self, cookies: Sequence[requests.Request], cells: memoryview) -> None:
        self._under_way -= len(cookies)
        self.reading_bytes -= len(cookies) * BLOCK_BYTES
        self._queue += replies.block_replies(cookies, cells, self._structured)

    def data(self, cookie: requests.Request, chunks: Chunks) -> None:
        self._under_way -= 1
        _, flags, handle, offset, length, _ = cookie
        self.reading_bytes -= length
        queue = self._queue
        if not self._structured:
            queue.append(replies.simple_reply(handle))
            self._plain(chunks)
            return
        if len(chunks) == 1 and chunks[0][1] is not None:
            queue.append(replies.data_chunk(handle, offset, length))
            queue.append(chunks[0][1])
            return
        if flags & nbd.CMD_FLAG_DF:  # one chunk, holes written out
            queue.append(replies.data_chunk(handle, offset, length))
            self._plain(chunks)
            return
        last = len(chunks) - 1
        for index, (count, data) in enumerate(chunks):
            if data is None:
                queue.append(replies.hole_chunk(handle, offset, count, done=index == last))
            else:
                queue.append(replies.data_chunk(handle, offset, count, done=index == last))
                queue.append(data)
            offset += count

    def _plain(self, chunks: Chunks) -> None:
        """The data of a read with its holes written out."""
        for count, data in chunks:
            if data is not None:
                self._queue.append(data)
                continue
            while count:
                part = min(count, len(_ZERO))
                self._queue.append(_ZERO[:part])
                count -= part

    def extents(self, cookie: requests.Request, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("BLOCK_STATUS is asked by block_status.py")

    def status(self, chunks: list[bytes]) -> None:
        """The reply to a BLOCK_STATUS."""
        self._under_way -= 1
        self._queue += chunks
