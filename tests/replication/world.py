"""A volume in memory: engine, ledger and structure above virtual replicas; the test moves time.

Nothing happens by itself. Bytes leave a link's outbox, arrive at a replica, and answers come back
only in `step`, which does one thing chosen by the test's random numbers, or in `settle`, which
does everything that is due. Work for threads, answers from threads and timers are steps too. So
one seed is one run.

After every batch the receive buffers are overwritten with garbage, as a real one would be by the
next batch: who keeps a view of it too long is found out by wrong content.

`model` is the volume as one plain bytearray: every operation is applied to it at the moment it
gets its place in the order. At the end all members must equal it (`check_members`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from protocol import replica as wire
from protocol.errors import BlockdError, PeerError
from protocol.streams import Inbox
from protocol.units import BLOCK_BYTES
from replication import membership
from replication.answers import Chunks, blocks_of
from replication.authority import IN_SYNC, OUT, Member, Record
from replication.engine import Engine
from replication.ledger import Ledger
from replication.link import Link
from replication.rebuild import Rebuild
from replication.returning import come_back
from replication.structure import Structure
from tests.replication.surroundings import Clock, MemoryAuthority
from tests.replication.virtual_replica import VirtualReplica, no_fault

STEPS_MAX = 50_000  # more than any test needs; a livelock ends here
VOLUME = "11111111-1111-1111-1111-111111111111"


@dataclass
class Request:
    """One client request and what became of it."""

    kind: str
    offset: int
    length: int
    data: bytes = b""
    submitted_at: int = 0
    error: int | None = None
    result: Any = None
    answers: int = 0
    sequences: list[int] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        return self.answers > 0


class Pipe:
    """The bytes between a link and its replica."""

    def __init__(self, link: Link, replica: VirtualReplica) -> None:
        self.link = link
        self.replica = replica
        self.to_replica = bytearray()
        self.to_volume = bytearray()
        self.inbox = Inbox(1 << 16)
        self.stalled = False  # nothing arrives at the replica
        self.muted = False  # nothing comes back


class World:
    """One open volume with `count` members."""

    def __init__(self, count: int = 3, size_bytes: int = 64 * BLOCK_BYTES, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.authority = MemoryAuthority()
        self.size_bytes = size_bytes
        self.replicas = {f"r{n}": VirtualReplica(f"r{n}", size_bytes) for n in range(count)}
        members = {uuid: Member(IN_SYNC, f"address-of-{uuid}") for uuid in self.replicas}
        record = self.authority.create(Record(VOLUME, "vol", size_bytes, members, epoch=1))
        self.fenced: list[str] = []
        self.ledger = Ledger(self.authority, record, self.clock, self.fenced.append)
        self.engine = Engine(self.ledger, self.clock.now)
        self.engine.on_lost = lambda link, reason: self._lost(link)
        self.structure = Structure(self.engine, lambda: "2026-01-01T00:00:00Z")
        self.pipes: dict[str, Pipe] = {}
        self.requests: list[Request] = []
        self.model = bytearray(size_bytes)
        self.events: list[tuple[int, int]] = []  # block ranges, in the order of the volume
        self.versions: dict[int, list[tuple[int, bytes]]] = {}
        self.uncertain: set[int] = set()  # blocks of writes that failed: old or new
        self.rebuilt: set[str] = set()
        self.sent_to: dict[int, set[Link]] = {}
        self._nested = 0
        self._spy()
        for uuid in self.replicas:
            link = Link(uuid, f"address-of-{uuid}", IN_SYNC)
            self.engine.links[uuid] = link
            self.pipes[uuid] = Pipe(link, self.replicas[uuid])
            membership.enter(self.engine, link)

    # ---- the model ------------------------------------------------------------------------

    def _spy(self) -> None:
        """See every operation at the moment it gets its sequence number."""
        engine = self.engine
        send_write, send_zero = engine.send_write, engine.send_zero

        def write(client: Any, cookie: Any, offset: int, data: memoryview, fua: bool) -> None:
            before = engine.sequence
            self._nested += 1
            send_write(client, cookie, offset, data, fua)
            self._nested -= 1
            self._ordered(client, cookie, offset, len(data), before)

        def zero(client: Any, cookie: Any, offset: int, length: int, keep: bool, fua: bool) -> None:
            before = engine.sequence
            self._nested += 1
            send_zero(client, cookie, offset, length, keep, fua)
            self._nested -= 1
            self._ordered(client, cookie, offset, length, before)

        engine.send_write = write  # type: ignore[method-assign]
        engine.send_zero = zero  # type: ignore[method-assign]

    def _ordered(self, client: Any, cookie: Any, offset: int, length: int, before: int) -> None:
        if self._nested or self.engine.sequence == before:
            return
        while client is not self:  # a request in parts: the stand-in knows whose it is
            if not hasattr(client, "_cookie"):
                return  # not asked for by the test
            client, cookie = client._client, client._cookie
        request = self.requests[cookie]
        request.sequences += range(before + 1, self.engine.sequence + 1)
        targets = set(self.engine.targets)
        self.sent_to.update(dict.fromkeys(range(before + 1, self.engine.sequence + 1), targets))
        start = max(offset, request.offset)
        stop = min(offset + length, request.offset + request.length)
        data = request.data or bytes(request.length)
        self.model[start:stop] = data[start - request.offset : stop - request.offset]
        self.events.append((offset, length))
        for number in range(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES):
            block = bytes(self.model[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
            self.versions.setdefault(number, []).append((len(self.events), block))

    def _could_be(self, number: int, data: bytes, since: int) -> bool:
        """Had block `number` this content at any time since `since` events had happened?"""
        versions = self.versions.get(number, [])
        old = [block for at, block in versions if at <= since]
        current = old[-1] if old else bytes(BLOCK_BYTES)
        return data == current or any(data == block for at, block in versions if at > since)

    # ---- the client -----------------------------------------------------------------------

    def _submit(self, request: Request) -> Request:
        request.submitted_at = len(self.events)
        self.requests.append(request)
        return request

    def write(self, offset: int, data: bytes, fua: bool = False) -> Request:
        request = self._submit(Request("write", offset, len(data), data))
        buffer = bytearray(data)
        self.engine.write(self, len(self.requests) - 1, offset, memoryview(buffer), fua)
        if self._send_everything(self.random.choice((1 << 30, 5000))):
            buffer[:] = b"\xee" * len(buffer)  # the next batch arrives in the same buffer
        return request

    def zero(self, offset: int, length: int, keep: bool = False, fua: bool = False) -> Request:
        request = self._submit(Request("zero", offset, length))
        self.engine.zero(self, len(self.requests) - 1, offset, length, keep, fua)
        return request

    def read(self, offset: int, length: int, layer_id: int = 0) -> Request:
        request = self._submit(Request("read", offset, length))
        request.result = layer_id
        self.engine.read(self, len(self.requests) - 1, offset, length, layer_id)
        return request

    def read_blocks(self, ranges: Sequence[tuple[int, int]]) -> list[Request]:
        """Reads of (first block, block count) that go together."""
        start = len(self.requests)
        for first, count in ranges:
            request = self._submit(Request("read", first * BLOCK_BYTES, count * BLOCK_BYTES))
            request.result = 0
        cookies = range(start, len(self.requests))
        firsts, counts = [first for first, _ in ranges], [count for _, count in ranges]
        self.engine.read_blocks(self, cookies, firsts, counts, 0)
        return self.requests[start:]

    def flush(self) -> Request:
        request = self._submit(Request("flush", 0, 0))
        self.engine.flush(self, len(self.requests) - 1)
        return request

    def ask_extents(self, offset: int, length: int, layer_id: int = 0) -> Request:
        request = self._submit(Request("extents", offset, length))
        self.engine.extents(self, len(self.requests) - 1, offset, length, layer_id)
        return request

    def done(self, cookie: Any, error: int) -> None:
        request = self.requests[cookie]
        request.answers += 1
        request.error = error
        if error and request.kind in ("write", "zero"):
            stop = -(-(request.offset + request.length) // BLOCK_BYTES)
            self.uncertain.update(range(request.offset // BLOCK_BYTES, stop))
        if not error and request.kind in ("write", "zero"):
            self._check_golden_rule(request)

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        for cookie, block in zip(cookies, blocks_of(cells), strict=True):
            self.data(cookie, [(BLOCK_BYTES, block)])

    def data(self, cookie: Any, chunks: Chunks) -> None:
        request = self.requests[cookie]
        request.answers += 1
        request.error = 0
        assert sum(count for count, _ in chunks) == request.length
        parts = [bytes(count) if part is None else bytes(part) for count, part in chunks]
        assert [len(part) for part in parts] == [count for count, _ in chunks]
        layer_id, request.result = request.result, b"".join(parts)
        if not layer_id:
            self._check_read(request)

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        request = self.requests[cookie]
        request.answers += 1
        request.error = 0
        request.result = list(runs)

    def _check_golden_rule(self, request: Request) -> None:
        """Answered means: applied on every member the record counts on."""
        assert request.sequences, "answered, but never sent to anybody"
        for uuid, member in self.authority.records[VOLUME].members.items():
            if member.state != OUT:
                missing = set(request.sequences) - set(self.replicas[uuid].order)
                if uuid in self.rebuilt:  # what was sent before its barrier is copied to it
                    link = self.link(uuid)
                    missing = {number for number in missing if link in self.sent_to[number]}
                assert not missing, f"answered before {uuid} ({member.state}) applied it"

    def _check_read(self, request: Request) -> None:
        """Every whole block read had that content while the read was under way."""
        first = -(-request.offset // BLOCK_BYTES)
        last = (request.offset + request.length) // BLOCK_BYTES
        for number in range(first, last):
            if number in self.uncertain:
                continue
            start = number * BLOCK_BYTES - request.offset
            block = request.result[start : start + BLOCK_BYTES]
            assert self._could_be(number, block, request.submitted_at), f"block {number} is wrong"

    # ---- moving bytes ---------------------------------------------------------------------

    def _send_everything(self, limit: int = 1 << 30) -> bool:
        sent = [self._send(pipe, limit) for pipe in list(self.pipes.values())]
        return all(sent)

    def _send(self, pipe: Pipe, limit: int) -> bool:
        def sendmsg(parts: list[Any]) -> int:
            data = b"".join(parts)[:limit]
            pipe.to_replica += data
            return len(data)

        return pipe.link.outbox.flush(sendmsg)

    def _arrive(self, pipe: Pipe, limit: int) -> None:
        data = bytes(pipe.to_replica[:limit])
        del pipe.to_replica[:limit]
        pipe.to_volume += pipe.replica.receive(data)

    def _answer(self, pipe: Pipe, limit: int) -> None:
        """A batch of bytes from a replica, the way the owner of a socket handles it."""
        inbox = pipe.inbox

        def receive(view: memoryview) -> int:
            count = min(limit, len(view), len(pipe.to_volume))
            view[:count] = pipe.to_volume[:count]
            del pipe.to_volume[:count]
            return count

        inbox.receive(receive)
        frames: list[wire.Frame] = []
        view = memoryview(inbox.buffer)
        try:
            start = wire.parse(view, view, inbox.start, inbox.end, frames)
            self.engine.received(pipe.link, frames)
        except PeerError as error:
            self.engine.fail(pipe.link, str(error))
            return
        view[:start] = b"\xee" * start
        inbox.take(start)
        if inbox.end > inbox.start:
            inbox.reserve(wire.needed(memoryview(inbox.buffer), inbox.start, inbox.end))

    def _release(self, pipe: Pipe, index: int, limit: int) -> None:
        pipe.to_volume += pipe.replica.deferred.pop(index)()

    def _job(self, index: int, limit: int) -> None:
        self.clock.run_job(index)

    def _due(self) -> list[Callable[[int], Any]]:
        """Everything that could happen next; the argument bounds how many bytes move."""
        due: list[Callable[[int], Any]] = []
        if self.clock.posted:
            due.append(lambda _: self.clock.posted.popleft()())
        for index in range(len(self.clock.jobs)):
            due.append(partial(self._job, index))
        for pipe in self.pipes.values():
            if pipe.link.outbox.queue:
                due.append(partial(self._send, pipe))
            if pipe.to_replica and not pipe.stalled:
                due.append(partial(self._arrive, pipe))
            if pipe.to_volume and not pipe.muted:
                due.append(partial(self._answer, pipe))
            if not pipe.stalled:
                for index in range(len(pipe.replica.deferred)):
                    due.append(partial(self._release, pipe, index))
        return due

    def step(self) -> bool:
        """One random thing happens; False if there is nothing to do."""
        due = self._due()
        if not due:
            return False
        limit = self.random.choice((1, 40, 4136, 70_000, 1 << 30, 1 << 30))
        self.random.choice(due)(limit)
        return True

    def steps(self, count: int) -> None:
        """At most `count` random things happen."""
        for _ in range(count):
            if not self.step():
                return

    def settle(self, *, chaotic: bool = False) -> None:
        """Everything that can happen without time passing happens."""
        for _ in range(STEPS_MAX):
            if chaotic:
                if not self.step():
                    return
                continue
            due = self._due()
            if not due:
                return
            due[0](1 << 30)
        raise AssertionError("this never ends")

    def settle_until(self, true: Callable[[], bool]) -> None:
        """Do what is due, in order, until something is true."""
        for _ in range(STEPS_MAX):
            if true():
                return
            due = self._due()
            assert due, "nothing is left to do, and it is still not true"
            due[0](1 << 30)
        raise AssertionError("this never ends")

    # ---- members --------------------------------------------------------------------------

    def make_room(self, uuid: str) -> None:
        """The disk of a member that is full gets space again."""
        replica = self.replicas[uuid]
        if replica.parked:
            self.pipes[uuid].to_volume += replica.make_room()
        else:
            replica.fault = no_fault

    def link(self, uuid: str) -> Link:
        return self.engine.links[uuid]

    def state(self, uuid: str) -> str:
        """The member's state in the authority."""
        return self.authority.records[VOLUME].members[uuid].state

    def lose(self, uuid: str) -> None:
        """The connection to a member breaks; what was on the way is gone."""
        self.engine.fail(self.link(uuid), "the connection broke")

    def _lost(self, link: Link) -> None:
        pipe = self.pipes.pop(link.replica_uuid, None)
        if pipe is not None:
            pipe.to_replica.clear()
            pipe.to_volume.clear()
            link.queue.clear()

    def reconnect(self, uuid: str, *, wait: bool = True) -> bool:
        """A lost member is reached again, by the rules of the volume daemon; was it let in?"""
        old = self.link(uuid)
        state = self.engine.record.members[uuid].state
        if old.connected or state != old.state or old.leaving or old in self.engine.targets:
            return False
        replica = self.replicas[uuid]
        replica.attach()
        link = Link(uuid, old.address, state)
        self.engine.links[uuid] = link
        self.pipes[uuid] = Pipe(link, replica)
        link.connected = True
        if state == IN_SYNC:
            come_back(self.engine, link)
            if wait:
                self.settle()
        return True

    def rebuild(self, uuid: str) -> list[BlockdError | None]:
        """Start a rebuild; the list gets its outcome."""
        outcome: list[BlockdError | None] = []
        self.rebuilt.add(uuid)
        Rebuild(self.engine, self.link(uuid), outcome.append).start()
        return outcome

    def snapshot(self, name: str) -> list[BlockdError | None]:
        """Ask for a snapshot; the list gets its outcome."""
        outcome: list[BlockdError | None] = []
        self.structure.create(name, {}, outcome.append)
        return outcome

    # ---- at the end -----------------------------------------------------------------------

    def check_members(self) -> None:
        """Members in sync are equal in every layer, and equal to the model; all is answered."""
        self.check_order()
        for request in self.requests:
            assert request.answers == 1, f"{request.kind} was answered {request.answers} times"
        in_sync = [uuid for uuid in self.replicas if self.state(uuid) == IN_SYNC]
        for uuid in in_sync:
            replica = self.replicas[uuid]
            assert replica.complete
            content = replica.content()
            for number in range(len(content) // BLOCK_BYTES):
                block = slice(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES)
                good = number in self.uncertain or content[block] == self.model[block]
                assert good, f"{uuid} differs from the model in block {number}"
            for layer_id, layer in replica.layers.items():
                if layer.removed:
                    continue  # folded sooner here, later there
                first = self.replicas[in_sync[0]].visible(layer_id)
                assert replica.visible(layer_id) == first, f"layer {layer_id} differs"

    def check_order(self) -> None:
        """Nobody broke the wire's rules, and nothing is left over."""
        for uuid, replica in self.replicas.items():
            assert replica.violations == [], f"{uuid}: {replica.violations}"
        assert not self.engine.locks.held
        assert not self.engine.locks.waiting
        assert not self.engine.pending
        assert not self.engine.flushes
