"""Requests that do not fit one message: sub-block edges, and more than one piece.

The members only ever see whole blocks. A write that covers part of a block holds the range lock,
reads the blocks at its edges, and is sent as whole blocks; the lock is released as soon as the
write has its place in the order. If a read fails, nothing was sent and the client gets the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX

if TYPE_CHECKING:
    from replication.answers import Chunks
    from replication.engine import Client, Engine

ZERO_STEP_BYTES = 64 << 20  # one ZERO keeps a replica's loop busy for a few milliseconds


class Gather:
    """Stands in for a client while several pieces of its request are under way."""

    def __init__(self, engine: Engine, client: Client, cookie: Any, fua: bool = False) -> None:
        self._engine = engine
        self._client = client
        self._cookie = cookie
        self._fua = fua
        self._error = 0
        self.left = 0

    def done(self, cookie: Any, error: int) -> None:
        """One piece ended; the last one answers the client with the first error."""
        self._error = self._error or error
        self.left -= 1
        if self.left:
            return
        if self._fua and not self._error:
            self._engine.flush(self._client, self._cookie)
        else:
            self._client.done(self._cookie, self._error)

    def data(self, cookie: Any, offset: int, chunks: Chunks) -> None:
        raise AssertionError("writes return no data")

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("writes return no extents")


def write_long(
    engine: Engine, client: Client, cookie: Any, offset: int, data: memoryview, fua: bool
) -> None:
    """Send a write of whole blocks in pieces, at consecutive places of the order."""
    gather = Gather(engine, client, cookie, fua)
    gather.left = -(-len(data) // PIECE_BYTES_MAX)
    for start in range(0, len(data), PIECE_BYTES_MAX):
        piece = data[start : start + PIECE_BYTES_MAX]
        engine.send_write(gather, None, offset + start, piece, False)


def zero_long(
    engine: Engine, client: Client, cookie: Any, offset: int, length: int, keep: bool, fua: bool
) -> None:
    """Send a ZERO of whole blocks in pieces."""
    gather = Gather(engine, client, cookie, fua)
    gather.left = -(-length // ZERO_STEP_BYTES)
    for start in range(0, length, ZERO_STEP_BYTES):
        step = min(ZERO_STEP_BYTES, length - start)
        engine.send_zero(gather, None, offset + start, step, keep, False)


class _LongRead:
    """Collects the pieces of a long read, which may come back in any order."""

    def __init__(self, client: Client, cookie: Any, offset: int, length: int) -> None:
        self._client = client
        self._cookie = cookie
        self._offset = offset
        self._buffer: memoryview | None = None
        self._length = length
        self._runs: dict[int, tuple[int, bool]] = {}
        self._error = 0
        self.left = 0

    def data(self, cookie: Any, offset: int, chunks: Chunks) -> None:
        for count, data in chunks:
            if data is not None:
                if self._buffer is None:
                    self._buffer = memoryview(bytearray(self._length))
                start = offset - self._offset
                self._buffer[start : start + count] = data
            self._runs[offset] = (count, data is not None)
            offset += count
        self._piece_done()

    def done(self, cookie: Any, error: int) -> None:
        self._error = self._error or error
        self._piece_done()

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("a read returns no extents")

    def _piece_done(self) -> None:
        self.left -= 1
        if self.left:
            return
        if self._error:
            self._client.done(self._cookie, self._error)
            return
        chunks: Chunks = []
        for offset in sorted(self._runs):
            count, has_data = self._runs[offset]
            start = offset - self._offset
            data = None
            if has_data:
                assert self._buffer is not None
                data = self._buffer[start : start + count]
            chunks.append((count, data))
        self._client.data(self._cookie, self._offset, chunks)


def read_long(
    engine: Engine, client: Client, cookie: Any, offset: int, length: int, layer_id: int
) -> None:
    """Read more than one piece and answer when all are there."""
    gather = _LongRead(client, cookie, offset, length)
    spans = []
    stop = offset + length
    while offset < stop:
        # Pieces end on block borders, so no block is read twice.
        step = min(stop, (offset // BLOCK_BYTES) * BLOCK_BYTES + PIECE_BYTES_MAX) - offset
        spans.append((offset, step))
        offset += step
    gather.left = len(spans)
    for start, step in spans:
        engine.send_read((gather, None, start, step, layer_id, ()))


class _Edges:
    """Reads the partly covered blocks of one write, then sends it as whole blocks."""

    def __init__(self, engine: Engine, client: Client, cookie: Any, fua: bool) -> None:
        self._engine = engine
        self._client = client
        self._cookie = cookie
        self._fua = fua
        self._left = 0
        self._error = 0

    def start(self, offset: int, data: memoryview) -> None:
        """Lock, read, merge, send, release."""
        self._offset = offset
        self._data = bytes(data)  # outlives the caller's receive buffer
        self._first = offset // BLOCK_BYTES
        self._stop = -(-(offset + len(data)) // BLOCK_BYTES)
        self._engine.locks.acquire(self._first, self._stop, self._locked)

    def _locked(self) -> None:
        self._buffer = bytearray((self._stop - self._first) * BLOCK_BYTES)
        end = self._offset + len(self._data)
        edges = set()
        if self._offset % BLOCK_BYTES:
            edges.add(self._first)
        if end % BLOCK_BYTES:
            edges.add(self._stop - 1)
        self._left = len(edges)
        for block in sorted(edges):
            self._engine.send_read((self, block, block * BLOCK_BYTES, BLOCK_BYTES, 0, ()))

    def data(self, cookie: Any, offset: int, chunks: Chunks) -> None:
        ((count, data),) = chunks
        if data is not None:
            start = offset - self._first * BLOCK_BYTES
            self._buffer[start : start + count] = data
        self._edge_done()

    def done(self, cookie: Any, error: int) -> None:
        self._error = self._error or error
        self._edge_done()

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("an edge read returns no extents")

    def _edge_done(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._error:
            self._client.done(self._cookie, self._error)
        else:
            start = self._offset - self._first * BLOCK_BYTES
            self._buffer[start : start + len(self._data)] = self._data
            self._engine.send_write(
                self._client,
                self._cookie,
                self._first * BLOCK_BYTES,
                memoryview(self._buffer),
                self._fua,
            )
        self._engine.locks.release(self._first, self._stop)


def write_partial(
    engine: Engine, client: Client, cookie: Any, offset: int, data: memoryview, fua: bool
) -> None:
    """A write whose first or last block is only partly covered."""
    _Edges(engine, client, cookie, fua).start(offset, data)


def zero_partial(
    engine: Engine, client: Client, cookie: Any, offset: int, length: int, keep: bool, fua: bool
) -> None:
    """Zero a range with partly covered blocks: the inside as ZERO, the edges as writes."""
    stop = offset + length
    inner = min(-(-offset // BLOCK_BYTES) * BLOCK_BYTES, stop)
    inner_stop = max(stop // BLOCK_BYTES * BLOCK_BYTES, inner)
    parts = [(offset, inner - offset), (inner_stop, stop - inner_stop)]
    gather = Gather(engine, client, cookie, fua)
    gather.left = sum(1 for _, count in parts if count) + (inner_stop > inner)
    for start, count in parts:
        if count:
            write_partial(engine, gather, None, start, memoryview(bytes(count)), False)
    if inner_stop > inner:
        engine.zero(gather, None, inner, inner_stop - inner, keep, False)
