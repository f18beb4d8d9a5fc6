"""Requests that do not fit one message: sub-block edges, and more than one piece.

The members only ever see whole blocks. A write that covers part of a block holds the range lock,
reads the blocks at its edges, and is sent as whole blocks; the lock is released as soon as the
write has its place in the order. If a read fails, nothing was sent and the client gets the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication.answers import Chunks, blocks_of, clip
from replication.link import Reads

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.reading import Client, Reading

PIECE_BLOCKS_MAX = PIECE_BYTES_MAX // BLOCK_BYTES
ZERO_STEP_BYTES = 64 << 20  # one ZERO keeps a replica's loop busy for a few milliseconds


class NoData:
    """Base of what asks for no data in a client's stead."""

    def data(self, cookie: Any, chunks: Chunks) -> None:
        raise AssertionError("no data was asked for")

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        raise AssertionError("no data was asked for")


class Gather(NoData):
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


class BlockReader:
    """A client inside the engine that reads whole blocks; subclasses say what for."""

    def data(self, cookie: Any, chunks: Chunks) -> None:
        raise NotImplementedError

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        for cookie, block in zip(cookies, blocks_of(cells), strict=True):
            self.data(cookie, [(BLOCK_BYTES, block)])

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("a read returns no extents")


class _Clip(BlockReader):
    """A read of some bytes of one piece: the whole blocks around them are read."""

    def __init__(self, client: Client, lead: int, length: int) -> None:
        self._client = client
        self._lead = lead
        self._length = length

    def data(self, cookie: Any, chunks: Chunks) -> None:
        self._client.data(cookie, clip(chunks, self._lead, self._length))

    def done(self, cookie: Any, error: int) -> None:
        self._client.done(cookie, error)


class _LongRead(BlockReader):
    """Collects the pieces of a long read, which may come back in any order."""

    def __init__(self, client: Client, cookie: Any, lead: int, length: int, pieces: int) -> None:
        self._client = client
        self._cookie = cookie
        self._lead = lead
        self._length = length
        self._pieces: list[Chunks] = [[] for _ in range(pieces)]
        self._left = pieces
        self._error = 0

    def data(self, cookie: Any, chunks: Chunks) -> None:
        # Copied: the views are good until the batch ends, and other pieces come later.
        self._pieces[cookie] = [
            (count, None if data is None else memoryview(bytes(data))) for count, data in chunks
        ]
        self._piece_done()

    def done(self, cookie: Any, error: int) -> None:
        self._error = self._error or error
        self._piece_done()

    def _piece_done(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._error:
            self._client.done(self._cookie, self._error)
        else:
            chunks = [chunk for piece in self._pieces for chunk in piece]
            self._client.data(self._cookie, clip(chunks, self._lead, self._length))


def read(
    engine: Reading, client: Client, cookie: Any, offset: int, length: int, layer_id: int
) -> None:
    """Read any range: the whole blocks around it, in pieces, answered when all are there."""
    first, stop = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
    lead = offset % BLOCK_BYTES
    firsts = range(first, stop, PIECE_BLOCKS_MAX)
    counts = [min(PIECE_BLOCKS_MAX, stop - start) for start in firsts]
    if len(counts) == 1:
        clipped = _Clip(client, lead, length)
        engine.send_reads(Reads(clipped, [cookie], firsts, counts, layer_id))
    else:
        gather = _LongRead(client, cookie, lead, length, len(counts))
        engine.send_reads(Reads(gather, range(len(counts)), firsts, counts, layer_id))


class _Edges(BlockReader):
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
        blocks = sorted(edges)
        self._engine.send_reads(Reads(self, blocks, blocks, [1] * len(blocks), 0))

    def data(self, cookie: int, chunks: Chunks) -> None:
        ((count, data),) = chunks
        if data is not None:
            start = (cookie - self._first) * BLOCK_BYTES
            self._buffer[start : start + count] = data
        self._edge_done()

    def done(self, cookie: Any, error: int) -> None:
        self._error = self._error or error
        self._edge_done()

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
