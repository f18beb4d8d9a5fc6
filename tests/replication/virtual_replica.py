"""A replica without sockets, files or threads: the wire on one side, plain dictionaries below.

It is as strict as a real one: what the wire forbids is a violation, which ends the session and is
remembered, and the tests look at `violations` at the end. Answers that a real replica gives from
a thread (flushes, cold reads) wait in `deferred` when `defers` is set, so that a test can let them
overtake each other. A change that `fault` lets fail with ENOSPC is parked, as the wire says it.

A layer is a dictionary from block number to data or None (None: explicitly zero; no key: look in
the parent).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from functools import partial

from protocol import replica as wire
from protocol.checksum import ZEROS, block_checksums
from protocol.errors import (
    BlockdError,
    NotFoundError,
    RequestError,
    StateError,
    StorageError,
)
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from tests.replication.virtual_layers import VirtualLayers

ZERO_BLOCK = bytes(BLOCK_BYTES)
ANSWERS = {wire.READ: ("read", wire.DATA), wire.EXTENTS: ("extents", wire.EXTENT_LIST)}
STRUCTURAL = ("seal", "revert")
LOOKING = (*STRUCTURAL, "zones", "stamps", "layer_regions", "layer_check")

Parked = tuple[int, int, int, bytes | Callable[[], bytes] | None]
"""sequence, first block, count, and the data (None: zeros) or what comes after it"""

Fault = Callable[[int, int, int], int]
"""(operation, offset, length) of a WRITE, ZERO or READ to an errno, 0 = go on"""


def no_fault(operation: int, offset: int, length: int) -> int:
    """Nothing goes wrong."""
    return 0


class VirtualReplica(VirtualLayers):
    """One copy of a volume. Sessions come and go (`attach`); the content stays."""

    def __init__(self, replica_uuid: str, size_bytes: int) -> None:
        self.replica_uuid = replica_uuid
        self.size_bytes = size_bytes
        super().__init__()
        self.applied = 0
        self.durable = 0
        self.flushed: dict[int, int] = {}
        self.violations: list[str] = []
        self.fault: Fault = no_fault
        self.nonsense: dict[str, bytes] = {}  # operation or control word: payload of its answer
        self.parked: list[Parked] = []
        self.newest = 0
        self.flush_fails = False
        self.corrupt: set[int] = set()
        self.defers = False
        self.deferred: list[Callable[[], bytes]] = []
        self.reads = 0
        self.attach()

    def attach(self) -> None:
        """A new session: nothing of the old one is left."""
        self._input = bytearray()
        self.deferred = []
        self.closed = False
        self.paused = False
        self.parked = []
        self.newest = 0

    # ---- content --------------------------------------------------------------------------

    def block(self, number: int, layer_id: int = 0) -> bytes | None:
        """The visible data of one block, None if it reads as zeros."""
        layer_id = layer_id or self.head_id
        while layer_id:
            layer = self.layers[layer_id]
            if number in layer.blocks:
                return layer.blocks[number]
            layer_id = layer.parent
        return None

    def content(self, layer_id: int = 0) -> bytes:
        """All bytes of the live volume or of a layer seen as a snapshot."""
        count = self.size_bytes // BLOCK_BYTES
        return b"".join(self.block(number, layer_id) or ZERO_BLOCK for number in range(count))

    def visible(self, layer_id: int) -> dict[int, bytes]:
        """The blocks that do not read as zeros."""
        layer = self.layers[layer_id]
        blocks = self.visible(layer.parent) if layer.parent else {}
        for number, block in layer.blocks.items():
            if block is None or block == ZERO_BLOCK:
                blocks.pop(number, None)
            else:
                blocks[number] = block
        return blocks

    # ---- frames ---------------------------------------------------------------------------

    def receive(self, data: bytes) -> bytes:
        """Bytes of the volume daemon in, answers out."""
        self._input += data
        buffer = self._input
        frames: list[wire.Frame] = []
        start = wire.parse(buffer, memoryview(buffer), 0, len(buffer), frames)
        answers = bytearray()
        applied = 0
        for frame in frames:
            if self.closed:
                break
            if frame[0] in (wire.WRITE, wire.ZERO):
                answers += self._change(frame)
                applied = applied if self.parked else frame[4]
                continue
            if applied and frame[0] != wire.READ:
                answers += self._applied(applied)
                applied = 0
            answers += self._other(frame)
        if applied and not self.closed:
            answers += self._applied(applied)
        self._input = bytearray(buffer[start:])
        return bytes(answers)

    def _violation(self, what: str) -> bytes:
        self.violations.append(what)
        self.closed = True
        return self._refuse(0, RequestError(what))

    def _applied(self, sequence: int) -> bytes:
        self.applied = sequence
        return wire.frame(wire.APPLIED, sequence)

    def make_room(self) -> bytes:
        """The disk is not full any more: what waited is applied; the answer."""
        self.fault = no_fault
        parked, self.parked = self.parked, []
        answers = b""
        for sequence, first, count, data in parked:
            if callable(data):
                answers += data()
            else:
                self._apply(sequence, first, count, data)
        return answers + self._applied(self.newest)

    def _overlaps_parked(self, first: int, count: int) -> bool:
        return any(other < first + count and first < other + n for _, other, n, _ in self.parked)

    @staticmethod
    def _refuse(sequence: int, error: BlockdError) -> bytes:
        return wire.refused_frame(sequence, error)

    def _bad_range(self, offset: int, length: int) -> str:
        if offset % BLOCK_BYTES or length % BLOCK_BYTES or not length:
            return f"offset {offset} length {length} is not whole blocks"
        if offset + length > self.size_bytes:
            return f"offset {offset} length {length} ends beyond the volume"
        return ""

    def _change(self, frame: wire.Frame) -> bytes:
        operation, _, length, offset, sequence, _, payload = frame
        if bad := self._bad_range(offset, length):
            return self._violation(bad)
        if sequence <= self.newest:
            return self._violation(f"sequence {sequence} after {self.newest}")
        if operation == wire.WRITE and length > PIECE_BYTES_MAX:
            return self._violation(f"a write of {length} bytes")
        self.newest = sequence
        count = length // BLOCK_BYTES
        first = offset // BLOCK_BYTES
        data = None
        if operation == wire.WRITE:
            if payload is None or len(payload) != length + 4 * count:
                return self._violation("a write with another payload size")
            data = bytes(payload[4 * count :])
            if list(struct.unpack_from(f"<{count}I", payload)) != block_checksums(data):
                return self._violation("a damaged write")
        return self._apply_or_park(sequence, first, count, data)

    def _apply_or_park(self, sequence: int, first: int, count: int, data: bytes | None) -> bytes:
        operation = wire.ZERO if data is None else wire.WRITE
        code = self.fault(operation, first * BLOCK_BYTES, count * BLOCK_BYTES)
        if code and code != errno.ENOSPC:
            return self._refuse(sequence, StorageError("no", errno=code))
        if code or self._overlaps_parked(first, count) or (self.parked and data is not None):
            self.parked.append((sequence, first, count, data))
            return b"" if len(self.parked) > 1 else wire.frame(wire.FULL, sequence, argument=code)
        self._apply(sequence, first, count, data)
        return wire.frame(wire.DONE, sequence) if self.parked else b""

    def _apply(self, sequence: int, first: int, count: int, data: bytes | None) -> None:
        self.order.append(sequence)
        self.touch(range(first, first + count))
        head = self.layers[self.head_id].blocks
        for index in range(count):
            block = data and data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            head[first + index] = block or None

    def _must_wait(self, frame: wire.Frame) -> bool:
        """Would it see that parked changes are missing?"""
        operation, _, length, offset, _, argument, payload = frame
        if operation == wire.READ and not argument:
            return any(map(self._overlaps_parked, *wire.read_ranges(payload)))
        if operation == wire.EXTENTS and not argument:
            return self._overlaps_parked(offset // BLOCK_BYTES, length // BLOCK_BYTES)
        if operation in (wire.LAYER_READ, wire.LAYER_HASH, wire.LAYER_WRITE, wire.MEND):
            return self._overlaps_parked(offset & 0xFFFFFFFF, frame[1])
        return operation == wire.CONTROL and wire.json_content(payload)["do"] in LOOKING

    def _other(self, frame: wire.Frame) -> bytes:
        operation, _, length, offset, sequence, argument, payload = frame
        if self.parked and self._must_wait(frame):
            kept = (*frame[:6], memoryview(bytes(payload)) if payload is not None else None)
            structural = (
                operation == wire.CONTROL and wire.json_content(payload)["do"] in STRUCTURAL
            )
            count = 1 << 40 if structural else 0
            self.parked.append((sequence, 0, count, lambda: self._other(kept)))
            return b""
        name, answer = ANSWERS.get(operation, ("", 0))
        if operation == wire.CONTROL:
            name, answer = wire.json_content(payload)["do"], wire.ANSWER
        if name in self.nonsense:
            bad = self.nonsense[name]
            if answer == wire.DATA:
                return wire.frame(answer, sequence, argument=1, payload_bytes=len(bad)) + bad
            return wire.covered_frame(answer, sequence, bad)
        try:
            if operation == wire.READ:
                return self._read(sequence, *wire.read_ranges(payload), argument)
            if operation == wire.FLUSH:
                return self._flush(sequence)
            if operation == wire.PING:
                return wire.frame(wire.PONG, sequence)
            if operation == wire.STABLE:
                if offset not in self.flushed:
                    return self._violation(f"STABLE of a flush that was not done: {offset}")
                self.note_stable(self.flushed[offset], argument)
                return b""
            if operation == wire.EXTENTS:
                return self._extents(sequence, offset, length, argument)
            if operation == wire.CONTROL:
                answer = self._control(wire.json_content(payload))
                return wire.json_frame(wire.ANSWER, sequence, answer)
            if operation in (wire.LAYER_READ, wire.LAYER_HASH, wire.LAYER_WRITE, wire.MEND):
                return self.copying(frame)
        except BlockdError as error:
            return self._refuse(sequence, error)
        return self._violation(f"operation {operation}")

    def _later(self, answer: Callable[[], bytes]) -> bytes:
        if not self.defers:
            return answer()
        self.deferred.append(answer)
        return b""

    def _read(self, sequence: int, firsts: list[int], counts: list[int], layer_id: int) -> bytes:
        """Ranges are answered together where that is possible, and when deferred one by one."""
        answers = b""
        together: list[tuple[int, int, int]] = []
        for number, (first, count) in enumerate(zip(firsts, counts, strict=True), sequence):
            if bad := self._bad_range(first * BLOCK_BYTES, count * BLOCK_BYTES):
                return self._violation(bad)
            if count * BLOCK_BYTES > PIECE_BYTES_MAX:
                return self._violation(f"a read of {count} blocks is over the limit")
            try:
                self._check_read(first, count, layer_id)
            except BlockdError as error:
                answers += self._data(together, layer_id) + self._refuse(number, error)
                together = []
                continue
            self.reads += 1
            if self.defers:
                answer = self._data([(number, first, count)], layer_id)
                self.deferred.append(partial(bytes, answer))
            else:
                together.append((number, first, count))
        return answers + self._data(together, layer_id)

    def _check_read(self, first: int, count: int, layer_id: int) -> None:
        if not self.complete and not layer_id:
            raise StateError("this replica is being rebuilt")
        if layer_id and layer_id not in self.layers:
            raise NotFoundError(f"no layer {layer_id}")
        if code := self.fault(wire.READ, first * BLOCK_BYTES, count * BLOCK_BYTES):
            raise StorageError("cannot be read", errno=code)

    def _data(self, reads: list[tuple[int, int, int]], layer_id: int) -> bytes:
        if not reads:
            return b""
        entries, data = b"", b""
        for _, first, count in reads:
            numbers = range(first, first + count)
            blocks = [self.block(number, layer_id) for number in numbers]
            one = _payload(blocks, [number in self.corrupt for number in numbers])
            entries += one[: 4 * count]
            data += bytes(wire.HEADROOM_BYTES) + one[4 * count :]
        payload = entries + data
        head = wire.frame(wire.DATA, reads[0][0], argument=len(reads), payload_bytes=len(payload))
        return head + payload

    def _flush(self, sequence: int) -> bytes:
        covered, newest = len(self.order), max(self.order, default=0)

        def end() -> bytes:
            if self.flush_fails:
                return self._refuse(sequence, StorageError("fdatasync failed"))
            self.durable = max(self.durable, newest)
            self.flushed[sequence] = covered
            return wire.frame(wire.FLUSHED, sequence)

        return self._later(end)

    def _extents(self, sequence: int, offset: int, length: int, layer_id: int) -> bytes:
        if bad := self._bad_range(offset, length):
            return self._violation(bad)
        runs: list[list[int]] = []
        for number in range(offset // BLOCK_BYTES, (offset + length) // BLOCK_BYTES):
            has_data = self.block(number, layer_id) is not None
            if runs and runs[-1][1] == has_data:
                runs[-1][0] += 1
            else:
                runs.append([1, has_data])
        return wire.extents_frame(sequence, [(count, bool(data)) for count, data in runs])


def _payload(blocks: list[bytes | None], corrupt: list[bool]) -> bytes:
    """DATA payload: entries, then the blocks that have data; `corrupt` ones damaged after that."""
    entries, data = [], []
    for block, bad in zip(blocks, corrupt, strict=True):
        if block is None and not bad:
            entries.append(ZEROS)
            continue
        block = block or ZERO_BLOCK
        entries += block_checksums(memoryview(block))
        data.append(bytes([block[0] ^ 1]) + block[1:] if bad else block)
    return struct.pack(f"<{len(entries)}I", *entries) + b"".join(data)
