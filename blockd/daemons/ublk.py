"""One ublk device as its server sees it: kernel requests to engine requests, answers to commits.

The counterpart of nbd_server.py for /dev/ublkbN. Requests come as completions of an io_uring that
lives in the daemon's loop by an eventfd; a batch is all that are there. The engine queues them on
the members, and the answers of a batch are committed by one system call, each together with the
fetch of the next request (COMMIT_AND_FETCH).

A tag is one of `depth` places for a request; it has a descriptor (written by the kernel), a buffer
and an entry of the ring, which is filled once. So a commit is two stores: the result into the
entry, the entry's number into the submission ring. The kernel puts the data of a write into the
buffer before the request is seen here, and takes the data of a read out of it at the commit.

Invariants:
- every request is committed at most once; one that is not, because this process ended or was told
  to stop, is given to the next server (USER_RECOVERY_REISSUE)
- the buffer of a write is lent to the members' outboxes until the engine answers. It answers when
  every target has applied the write; a member that left the targets has an empty outbox
- while the daemon is congested no further requests are taken: they wait in the kernel
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockd.daemons import process
from blockd.kernel import ublk
from blockd.kernel.io_uring import COMMAND_AT, Ring, address_of, result_of
from blockd.loop import READ
from protocol import replica as wire
from protocol.units import BLOCK_BYTES

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon
    from replication.answers import Chunks

DEPTH = 128  # as many as an NBD connection of the kernel has
IO_BYTES_MAX = 512 << 10  # 64 MiB under way at most, which is what may wait for a full disk

_MASK = (BLOCK_BYTES >> ublk.SECTOR_SHIFT) - 1  # sectors that do not fill a block
_LARGE_SECTORS = 64 << 10 >> ublk.SECTOR_SHIFT  # what larger requests used of the buffers is kept
_KEPT_SECONDS = 10.0  # so long, and given back when there was no other one
_DONTNEED_LOCKED = 24  # MADV_DONTNEED_LOCKED of 5.18: MADV_DONTNEED of locked memory
_ZEROS = bytes(IO_BYTES_MAX)
_RESULT_AT = (COMMAND_AT + 4) >> 2  # the result of an entry's command, in words of 4 bytes
_ENTRY_WORDS = 64 >> 2


class UblkDevice:
    """A device of the live volume (layer 0) or of a snapshot; also the engine's `Client`.

    A request's cookie is its place: queue * depth + tag.
    """

    def __init__(self, daemon: VolumeDaemon, info: ublk.Info, snapshot: str, layer_id: int) -> None:
        self._daemon = daemon
        self._engine = daemon.engine
        self.info = info
        self.snapshot = snapshot
        self.layer_id = layer_id
        self.state = "starting"
        self.answers: list[int] = []  # places whose results are to be committed
        self._held = False  # by congestion
        self._paused = False
        self._under_way = 0
        self._ended = 0  # places that the kernel gave back
        self._large = 0  # large requests so far
        self._giving_back = False
        self._is_open = False

    def open(self) -> None:
        """Fetch all tags; from then on requests are served. Raises OSError."""
        info = self.info
        places, self._io_bytes = info.queues * info.depth, info.io_bytes
        self._lengths = [0] * places
        self._character = os.open(info.character_path, os.O_RDWR | os.O_CLOEXEC)
        opened: list[Any] = []
        try:
            page = mmap.PAGESIZE
            length = -(-info.depth * ublk.IO_DESCRIPTOR_BYTES // page) * page
            apart = -(-ublk.QUEUE_DEPTH_MAX * ublk.IO_DESCRIPTOR_BYTES // page) * page
            self._descriptors = []
            for queue in range(info.queues):
                memory = mmap.mmap(
                    self._character, length, prot=mmap.PROT_READ, offset=queue * apart
                )
                opened.append(memory)
                self._descriptors.append(memory)
            self._words = [memoryview(memory).cast("Q") for memory in self._descriptors]
            # Private and not reserved: it takes memory where it is used.
            self._memory = mmap.mmap(
                -1, places * info.io_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            opened.append(self._memory)
            self._buffer = memoryview(self._memory)
            self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._ring = Ring(places, deferred=True)
            self._ring.notify(self._eventfd)
        except OSError:
            for thing in opened:
                thing.close()
            os.close(self._character)
            raise
        self._results = self._ring.entries.cast("i")
        self._is_open = True
        self._fetch_all()
        # Edge-triggered: the eventfd need not be read.
        self._daemon.loop.register(self._eventfd, READ | select.EPOLLET, self._ready)

    def _fetch_all(self) -> None:
        info, ring = self.info, self._ring
        base = address_of(self._memory)
        for operation in (ublk.FETCH, ublk.COMMIT_AND_FETCH):
            for place in range(info.queues * info.depth):
                queue, tag = divmod(place, info.depth)
                address = base + place * info.io_bytes
                command = ublk.IO_COMMAND.pack(queue, tag, 0, address)
                ring.fill(place, self._character, operation, command)
            if operation == ublk.FETCH:
                ring.submit(range(info.queues * info.depth))

    # ---- requests -------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if self._held or self._paused or not self._is_open:
            return
        ring, daemon, engine = self._ring, self._daemon, self._engine
        ring.run()
        found = ring.reap()
        if not found:
            return
        self._under_way += len(found) >> 1
        engine.next_turn()
        cookies: list[int] = []
        firsts: list[int] = []
        counts: list[int] = []
        words, depth, lengths = self._words, self.info.depth, self._lengths
        several = len(words) > 1
        descriptors = words[0]
        for index in range(0, len(found), 2):
            place = found[index]
            if found[index + 1] & 0xFFFFFFFF:
                self._given_back(place, result_of(found[index + 1]))
                continue
            at = place
            if several:
                queue, at = divmod(place, depth)
                descriptors = words[queue]
            word, sector = descriptors[3 * at], descriptors[3 * at + 1]
            sectors = word >> 32
            lengths[place] = sectors << 9
            if sectors > _LARGE_SECTORS:
                self._large_request()
            if word & 0xFF == ublk.OP_READ and not (sector | sectors) & _MASK:
                cookies.append(place)
                firsts.append(sector >> 3)
                counts.append(sectors >> 3)
            elif word & (0xFF | ublk.IO_FUA) == ublk.OP_WRITE and not self.layer_id:
                begin = place * self._io_bytes
                data = self._buffer[begin : begin + (sectors << 9)]
                engine.write(self, place, sector << 9, data, False)
            else:
                self._other(place, word & 0xFFFFFFFF, sector << 9, sectors << 9)
        if cookies:
            engine.read_blocks(self, cookies, firsts, counts, self.layer_id)
        daemon.send_to_members()
        daemon.send_to_clients()
        if daemon.congested and not self._held:
            self._held = True
            daemon.waiting.append(self)

    def _large_request(self) -> None:
        self._large += 1
        if not self._giving_back:
            self._giving_back = True
            self._look_at_buffers(0)

    def _look_at_buffers(self, large: int) -> None:
        """Give memory of the buffers back when no large request came since the last look."""
        if not self._is_open:
            return
        if large != self._large or self._under_way:
            seen = self._large
            self._daemon.loop.later(_KEPT_SECONDS, lambda: self._look_at_buffers(seen))
            return
        self._giving_back = False
        with contextlib.suppress(OSError, ValueError):  # it may not be possible, and need not be
            self._memory.madvise(_DONTNEED_LOCKED)

    def _other(self, place: int, word: int, offset: int, length: int) -> None:
        """What is not frequent."""
        engine, operation = self._engine, word & 0xFF
        fua = bool(word & ublk.IO_FUA)
        if operation == ublk.OP_READ:
            engine.read(self, place, offset, length, self.layer_id)
        elif operation == ublk.OP_FLUSH:
            self._lengths[place] = 0
            if self.layer_id:
                self.done(place, 0)
            else:
                engine.flush(self, place)
        elif self.layer_id:
            self.done(place, errno.EPERM)
        elif operation == ublk.OP_WRITE:
            begin = place * self._io_bytes
            engine.write(self, place, offset, self._buffer[begin : begin + length], fua)
        elif operation in (ublk.OP_DISCARD, ublk.OP_WRITE_ZEROES):
            self._lengths[place] = 0
            keep = operation == ublk.OP_WRITE_ZEROES and bool(word & ublk.IO_NOUNMAP)
            engine.zero(self, place, offset, length, keep, fua)
        else:
            self.done(place, errno.EOPNOTSUPP)

    def _given_back(self, place: int, result: int) -> None:
        """No request will come for this place any more: the device was stopped."""
        if result != -errno.ENODEV:
            process.log(f"{self.info.path}: place {place} ended: {os.strerror(-result)}")
        self._under_way -= 1
        self._ended += 1
        if self._ended == len(self._lengths):
            self._daemon.loop.post(lambda: self._daemon.device_stopped(self))

    def resume(self) -> None:
        """The members took what was waiting for them: go on."""
        self._held = False
        self._daemon.loop.post(lambda: self._ready(0))

    def pause(self) -> None:
        """Take no more requests; they wait in the kernel."""
        self._paused = True

    def go_on(self) -> None:
        """Take requests again."""
        self._paused = False
        self._daemon.loop.post(lambda: self._ready(0))

    @property
    def quiet(self) -> bool:
        """Are all requests that were taken answered, too?"""
        return not self._under_way

    # ---- answers (the engine calls these) ---------------------------------------------------

    def done(self, cookie: int, error: int) -> None:
        self._commit(cookie, -error if error else self._lengths[cookie])

    def blocks(self, cookies: Sequence[int], cells: memoryview) -> None:
        if not self._is_open:
            return
        buffer, results, io_bytes = self._buffer, self._results, self._io_bytes
        at = wire.HEADROOM_BYTES
        for place in cookies:
            begin = place * io_bytes
            buffer[begin : begin + BLOCK_BYTES] = cells[at : at + BLOCK_BYTES]
            results[place * _ENTRY_WORDS + _RESULT_AT] = BLOCK_BYTES
            at += wire.CELL_BYTES
        self.answers += cookies

    def data(self, cookie: int, chunks: Chunks) -> None:
        if not self._is_open:
            return
        at = cookie * self._io_bytes
        for count, data in chunks:
            self._buffer[at : at + count] = _ZEROS[:count] if data is None else data
            at += count
        self._commit(cookie, self._lengths[cookie])

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("the kernel asks for no extents")

    def _commit(self, place: int, result: int) -> None:
        if self._is_open:
            self._results[place * _ENTRY_WORDS + _RESULT_AT] = result
            self.answers.append(place)

    def flush(self) -> None:
        """Commit all answers and fetch what comes next on their places."""
        if self._is_open:
            answers, self.answers = self.answers, []
            self._under_way -= len(answers)
            self._ring.submit(answers)

    # ---- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the device. If it was not stopped, it waits for another server."""
        if not self._is_open:
            return
        self._is_open = False
        self.answers.clear()
        self._daemon.loop.unregister(self._eventfd)
        self._results.release()
        self._ring.close()
        os.close(self._eventfd)
        for view in self._words:
            view.release()
        for memory in self._descriptors:
            memory.close()
        os.close(self._character)
        # Requests under way may still lend slices of the buffer: it goes when the last one does.
        del self._buffer, self._memory
