"""Reads: which member answers them, and what becomes of an answer.

The part of the engine that a read goes through. Reads of one batch go to one member; a bad or
missing answer is asked of another one; data is passed on only if every block matches its checksum.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from protocol import replica as wire
from protocol.checksum import crc32c
from protocol.units import BLOCK_BYTES
from replication import pieces
from replication.answers import Chunks, data_chunks, data_entries, single_blocks
from replication.lease import Lease
from replication.link import Link, Reads
from replication.pace import Latency
from replication.repair import Repairs

if TYPE_CHECKING:
    from replication.engine import Engine

BATCHES_PER_TURN = 64  # a member that stays awake answers sooner than one that is woken each time


class Client(Protocol):
    """A front-end connection; `cookie` is whatever it gave with the request."""

    def done(self, cookie: Any, error: int) -> None:
        """A request without data ended (0 or an errno), or a read failed."""

    def data(self, cookie: Any, chunks: Chunks) -> None:
        """A read ended well. The views are good until the caller's batch ends."""

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        """Several reads of one block each ended well, with data: `answers.blocks_of(cells)`.

        The client may write to the room before each block; otherwise as `data`.
        """

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        """(block count, has data) runs that begin at the block of the asked offset."""


class Reading:
    """See the module text; base of the engine."""

    now: Callable[[], float]
    latency: Latency

    def __init__(self, engine: Engine) -> None:
        self.lease = Lease(engine)
        self.repairs = Repairs(engine)
        self.sequence = 0
        self.readers: list[Link] = []
        self.reader: Link | None = None  # whose turn it is; None if nobody may be read
        self.reads_total = self.read_bytes = self.checksum_errors = 0
        self._turn = 0

    def read(
        self, client: Client, cookie: Any, offset: int, length: int, layer_id: int = 0
    ) -> None:
        """Read any byte range of the live volume or of a snapshot."""
        self.reads_total += 1
        self.read_bytes += length
        pieces.read(self, client, cookie, offset, length, layer_id)

    def read_blocks(
        self,
        client: Client,
        cookies: Sequence[Any],
        firsts: Sequence[int],
        counts: Sequence[int],
        layer_id: int,
    ) -> None:
        """Read several ranges of whole blocks, each at most PIECE_BYTES_MAX, as one message."""
        self.reads_total += len(cookies)
        self.read_bytes += sum(counts) * BLOCK_BYTES
        self.send_reads(Reads(client, cookies, firsts, counts, layer_id))

    def send_reads(self, reads: Reads) -> None:
        """Queue reads on a member that has not answered them badly; EIO if there is none."""
        now, lease = self.now(), self.lease
        if now >= lease.renew_at:
            if now >= lease.until:
                lease.wait(reads)
                return
            lease.renew()
        link = self.reader
        if link is None or link in reads.tried:
            link = next((reader for reader in self.readers if reader not in reads.tried), None)
        if link is None:
            for cookie in reads.cookies:
                reads.client.done(cookie, errno.EIO)
            return
        if link.read_now is not None:
            link.read_now(reads)
            return
        if self.latency.wanted:
            reads.sent_at = now
        count = len(reads.cookies)
        for start in range(0, count, wire.READS_MAX):
            part = reads if count <= wire.READS_MAX else reads.part(start, start + wire.READS_MAX)
            first = self.remember(link, part)
            link.queue.append(wire.read_frame(first, part.firsts, part.counts, part.layer_id))

    def remember(self, link: Link, reads: Reads) -> int:
        """Number reads that `link` will answer later; the first number."""
        first = self.sequence + 1
        self.sequence += len(reads.cookies)
        link.reads[first] = reads
        return first

    def next_turn(self) -> None:
        """A batch of reads goes to one member, and after BATCHES_PER_TURN of them to the next."""
        self._turn += 1
        if self._turn % BATCHES_PER_TURN == 0 and self.readers:
            self.reader = self.readers[self._turn // BATCHES_PER_TURN % len(self.readers)]

    def answered(self, link: Link, first: int, count: int, payload: memoryview | None) -> None:
        """The data of `count` reads, numbered from `first` on."""
        reads = link.take_answered(first, count)
        try:
            self.deliver(link, reads, payload or memoryview(b""))
        except wire.WireError:
            link.reads[first] = reads  # asked again when the link fails by this
            raise

    def deliver(self, link: Link, reads: Reads, payload: memoryview) -> None:
        """Hand the data of reads to who asked for them; WireError, before that, if it cannot be."""
        link.reads_total += len(reads.cookies)
        if reads.sent_at:
            self.latency.wanted = False
            self.latency.sample(reads.sent_at)
        cells = single_blocks(payload, reads.counts)
        if cells is not None:
            reads.client.blocks(reads.cookies, cells)
            return
        entries = data_entries(payload, reads.counts)
        position, block = 4 * len(entries), 0
        for number, length in enumerate(reads.counts):
            chunks, position = data_chunks(entries[block : block + length], payload, position)
            block += length
            if chunks is None:
                self.checksum_errors += 1
                self.bad_answer(link, reads.part(number, number + 1))
            else:
                reads.client.data(reads.cookies[number], chunks)

    def deliver_blocks(
        self,
        link: Link,
        reads: Reads,
        entries: list[int],
        blocks: list[memoryview],
        cells: memoryview,
    ) -> bool:
        """`deliver` for a local member that read single blocks; False if one does not match."""
        if list(map(crc32c, blocks)) != entries:
            return False
        link.reads_total += len(entries)
        reads.client.blocks(reads.cookies, cells)
        return True

    def bad_answer(self, link: Link, read: Reads) -> None:
        """A member cannot read what it has: another one answers, and it is repaired."""
        if not read.tried:  # what a repair asks for itself is not repaired
            self.repairs.damaged(link, read.layer_id, read.firsts[0], read.counts[0])
        self.read_elsewhere(link, read)

    def read_elsewhere(self, link: Link, reads: Reads) -> None:
        """Wrong or no data from one member: ask each other one once, then give up with EIO."""
        link.errors += 1
        reads.tried = (*reads.tried, link)
        self.send_reads(reads)

    def set_readers(self, readers: list[Link]) -> None:
        """Who may be read from now on."""
        self.readers = readers
        if self.reader not in readers:
            self.reader = readers[0] if readers else None
