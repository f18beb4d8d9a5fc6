"""The user of the volume: requests with values of their own, and a note of each in the history.

It speaks to the engine of the volume daemon as an NBD connection does. Some blocks are used by
sectors: those are registers of 512 bytes each. When the daemon is gone, what was not answered may
or may not have happened.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES
from replication.answers import Chunks, blocks_of
from replication.authority import IN_SYNC
from tests.sim.cluster import Cluster, VolumeProcess
from tests.sim.history import NEVER, Op, Register, Snapshot, Value
from tests.sim.kernel import Violation

SECTOR = 512
SECTORS = BLOCK_BYTES // SECTOR
_U64 = struct.Struct("<Q")
_SERIAL_BITS = 40
UNDER_WAY_MAX = 12


def fill(serial: int, place: int, count_bytes: int) -> bytes:
    """The content of one register that a write with this number leaves."""
    return _U64.pack(serial | place << _SERIAL_BITS) * (count_bytes // 8)


def value_of(data: memoryview | bytes, place: int) -> int:
    """The number of the write whose content this is; 0 for zeros, -1 for anything else."""
    head = bytes(data[:8])
    if data != head * (len(data) // 8):
        return -1
    (word,) = _U64.unpack(head)
    if not word:
        return 0
    if word >> _SERIAL_BITS != place:
        return -1
    return int(word & (1 << _SERIAL_BITS) - 1)


@dataclass
class Request:
    """One request under way."""

    kind: str
    volume: VolumeProcess
    began: float
    ops: list[Op]
    offset: int = 0
    length: int = 0
    snapshot: str = ""
    covered: Sequence[Op] = ()  # answered writes that a flush makes durable
    fua: bool = False


class Client:
    """One consumer with several requests under way."""

    def __init__(
        self, cluster: Cluster, grounds: list[list[int]], sector_blocks: list[int]
    ) -> None:
        self.cluster = cluster
        self.kernel = cluster.kernel
        self.random = cluster.kernel.random
        self.grounds = grounds
        self.ground = grounds[0]  # the blocks it uses just now
        self.used = [block for ground in grounds for block in ground]
        self.all_used = set(self.used)
        self.sector_blocks = set(sector_blocks)
        self.registers: dict[int, Register] = {}  # by number of their first sector
        for block in self.used:
            for sector in range(SECTORS if block in self.sector_blocks else 1):
                place = block * SECTORS + sector
                name = f"block {block}" + (f" sector {sector}" if sector or block in
                                           self.sector_blocks else "")  # fmt: skip
                self.registers[place] = Register(name)
        self.snapshots: dict[str, Snapshot] = {}
        self.under_way: dict[int, Request] = {}
        self.serial = 0
        self.answered = 0
        self.failed = 0
        self.peaceful = False
        self.failed_in_peace = 0
        self._unflushed: list[Op] = []

    # ---- registers ----------------------------------------------------------------------------

    def places(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(place, offset, bytes) of the registers in a range of the volume."""
        found = []
        at = offset
        while at < offset + length:
            block = at // BLOCK_BYTES
            size = SECTOR if block in self.sector_blocks else BLOCK_BYTES
            if at // SECTOR in self.registers:
                found.append((at // SECTOR, at, size))
            at += size
        return found

    def decode(self, data: bytes | memoryview, place: int) -> Value:
        """What a register holds, given its bytes."""
        value = value_of(data, place)
        if value >= 0 or len(data) == SECTOR:
            return value
        parts = (data[at : at + SECTOR] for at in range(0, BLOCK_BYTES, SECTOR))
        return tuple(value_of(part, place) for part in parts)

    # ---- asking -------------------------------------------------------------------------------

    def _submit(self, request: Request) -> int:
        self.serial += 1
        self.under_way[self.serial] = request
        return self.serial

    def act(self, volume: VolumeProcess) -> None:
        """Ask for something; called in the name of the volume daemon's process."""
        daemon = volume.daemon
        if not volume.usable or daemon is None or daemon.stopping:  # then it has no connections
            return
        here = [request for request in self.under_way.values() if request.volume is volume]
        if len(here) >= 2 * UNDER_WAY_MAX:
            return
        dice = self.random.random()
        if len(here) >= UNDER_WAY_MAX:
            dice *= 0.45  # held changes must not keep it from reading
        if dice < 0.03 and self.snapshots:
            self.read(volume, *self.range(), snapshot=self.random.choice(list(self.snapshots)))
        elif dice < 0.45:
            self.read(volume, *self.range())
        elif dice < 0.85:
            self.write(volume, *self.range(), fua=self.random.random() < 0.08)
        elif dice < 0.92:
            everything = len(self.grounds) > 1 and self.random.random() < 0.3
            where = self.everything() if everything else self.range()
            self.zero(volume, *where, fua=self.random.random() < 0.1)
        else:
            self.flush(volume)

    def everything(self) -> tuple[int, int]:
        """Offset and length of all blocks that it uses just now."""
        return self.reach(self.ground)

    def reach(self, ground: list[int]) -> tuple[int, int]:
        """Offset and length from the first to the last of these blocks."""
        first, last = min(ground), max(ground)
        return first * BLOCK_BYTES, (last + 1 - first) * BLOCK_BYTES

    def range(self) -> tuple[int, int]:
        """Offset and length; a few blocks are hot, some ranges are long."""
        index = int(len(self.ground) * self.random.random() ** 3)
        block = self.ground[index]
        if block in self.sector_blocks and self.random.random() < 0.7:
            first = self.random.randrange(SECTORS)
            count = self.random.randint(1, SECTORS - first)
            return block * BLOCK_BYTES + first * SECTOR, count * SECTOR
        count = 1
        while self.random.random() < 0.3 and block + count in self.all_used:
            count += 1
        return block * BLOCK_BYTES, count * BLOCK_BYTES

    def read(self, volume: VolumeProcess, offset: int, length: int, snapshot: str = "") -> None:
        request = Request("read", volume, self.kernel.now, [], offset, length, snapshot)
        cookie = self._submit(request)
        engine = volume.daemon.engine if volume.daemon is not None else None
        assert engine is not None
        assert volume.daemon is not None
        layer_id = 0
        if snapshot:
            layer = engine.record.layer_named(snapshot)
            if layer is None:
                del self.under_way[cookie]
                return
            layer_id = layer.id
        if not (offset | length) % BLOCK_BYTES and self.random.random() < 0.5:
            first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
            engine.read_blocks(self, [cookie], [first], [count], layer_id)
        else:
            engine.read(self, cookie, offset, length, layer_id)
        engine.next_turn()
        if self.random.random() < 0.3 and engine.readers:
            engine.reader = self.random.choice(engine.readers)
        volume.daemon.send_everything()

    def read_at(self, volume: VolumeProcess, block: int) -> None:
        """One block from the member whose turn it is."""
        request = Request("read", volume, self.kernel.now, [], block * BLOCK_BYTES, BLOCK_BYTES)
        cookie = self._submit(request)
        assert volume.daemon is not None
        volume.daemon.engine.read_blocks(self, [cookie], [block], [1], 0)
        volume.daemon.send_everything()

    def _change(self, request: Request) -> int:
        cookie = self._submit(request)
        value = 0 if request.kind == "zero" else cookie
        for place, _, _ in self.places(request.offset, request.length):
            op = Op(value, request.began, write=True)
            self.registers[place].writes.append(op)
            request.ops.append(op)
        return cookie

    def write(self, volume: VolumeProcess, offset: int, length: int, fua: bool = False) -> None:
        request = Request("write", volume, self.kernel.now, [], offset, length, fua=fua)
        cookie = self._change(request)
        parts = [fill(cookie, place, size) for place, _, size in self.places(offset, length)]
        data = bytearray(b"".join(parts))
        assert len(data) == length
        assert volume.daemon is not None
        volume.daemon.engine.write(self, cookie, offset, memoryview(data), fua)
        if volume.daemon.send_to_members():
            data[:] = b"\xee" * length  # the next batch arrives in the same buffer

    def zero(self, volume: VolumeProcess, offset: int, length: int, fua: bool = False) -> None:
        request = Request("zero", volume, self.kernel.now, [], offset, length, fua=fua)
        cookie = self._change(request)
        keep = self.random.random() < 0.2
        assert volume.daemon is not None
        volume.daemon.engine.zero(self, cookie, offset, length, keep, fua)
        volume.daemon.send_everything()

    def flush(self, volume: VolumeProcess) -> None:
        covered = self._unflushed
        request = Request("flush", volume, self.kernel.now, [], covered=list(covered))
        cookie = self._submit(request)
        assert volume.daemon is not None
        volume.daemon.engine.flush(self, cookie)
        volume.daemon.send_everything()

    # ---- answers (a Client of the engine) -----------------------------------------------------

    def _answer(self, cookie: int) -> Request | None:
        request = self.under_way.pop(cookie, None)
        if request is not None:
            self.answered += 1
        return request

    def done(self, cookie: Any, error: int) -> None:
        request = self._answer(cookie)
        if request is None:
            return
        if error:
            self.failed += 1
            self.failed_in_peace += self.peaceful
            for op in request.ops:
                op.failed = self.kernel.now
            if request.kind == "read":
                self.kernel.log("client", f"read of {request.offset} failed: {error}")
            return
        now = self.kernel.now
        if request.kind != "flush":
            self._check_enough(request.volume)
        for op in request.ops:
            op.ended = now
            if request.fua:
                op.durable = now
            else:
                self._unflushed.append(op)
        for op in request.covered:
            op.durable = min(op.durable, now)
        if request.kind == "flush":
            self._unflushed = [op for op in self._unflushed if op.durable == NEVER]

    def _check_enough(self, volume: VolumeProcess) -> None:
        """A change is acknowledged only while enough members are in sync."""
        record = volume.daemon.engine.record if volume.daemon is not None else None
        if record is not None:
            count = sum(member.state == IN_SYNC for member in record.members.values())
            if count < record.min_in_sync:
                raise Violation(f"acknowledged with {count} members in sync")

    def data(self, cookie: Any, chunks: Chunks) -> None:
        request = self._answer(cookie)
        if request is None:
            return
        content = b"".join(bytes(count) if data is None else data for count, data in chunks)
        assert len(content) == request.length, (len(content), request.length)
        for place, at, size in self.places(request.offset, request.length):
            start = at - request.offset
            value = self.decode(content[start : start + size], place)
            op = Op(value, request.began, self.kernel.now)
            if request.snapshot:
                self.registers[place].snapshot_reads.append((request.snapshot, op))
            else:
                self.registers[place].reads.append(op)

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        for cookie, block in zip(cookies, blocks_of(cells), strict=True):
            self.data(cookie, [(BLOCK_BYTES, block)])

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        self._answer(cookie)

    def volume_ended(self, volume: VolumeProcess) -> None:
        """Nobody answers these any more."""
        for cookie, request in list(self.under_way.items()):
            if request.volume is volume:
                del self.under_way[cookie]

    # ---- snapshots ----------------------------------------------------------------------------

    def snapshot(self, volume: VolumeProcess, ended: Callable[[bool], None]) -> None:
        """Make one; `ended(was it answered well)`."""
        name = f"s{len(self.snapshots) + 1}"
        snapshot = self.snapshots[name] = Snapshot(name, self.kernel.now)

        def done(error: BlockdError | None) -> None:
            snapshot.ended = self.kernel.now
            self.kernel.log("client", f"snapshot {name}: {error or 'made'}")
            ended(error is None)

        assert volume.daemon is not None
        volume.daemon.structure.create(name, {}, done)
        volume.daemon.send_everything()
