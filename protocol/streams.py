"""Receive and send buffers of one byte stream, shaped for batches.

`Inbox` owns one large buffer: the loop fills it with `recv_into`, a parser takes slices out of
it, nothing is copied. As long as somebody may still hold such slices (a peer's full send queue, a
write that waits for a lock) the buffer must not be filled again: the owner then calls
`take(start, pinned=True)`, which goes on in a fresh buffer. `Outbox` is a list of buffers that
leave in one `sendmsg`.

Invariants: 0 <= start <= end <= capacity. An Outbox keeps order; a buffer is in it until the
last byte of it was taken by the kernel. The socket calls come in as arguments.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

INBOX_BYTES = 1 << 20  # 250 requests of 4 KiB in one batch; larger requests grow it
IOV_MAX = 1024  # buffers one sendmsg may take (Linux UIO_MAXIOV)
_LOW_SPACE_BYTES = 256 << 10  # below this much free space the unread rest moves to the front

Buffer = bytes | bytearray | memoryview


def lazy_buffer(capacity: int) -> memoryview:
    """`capacity` bytes that take memory only where they are used (a bytearray takes it at once)."""
    return memoryview(mmap.mmap(-1, capacity))


class Inbox:
    """One growing and renewing receive buffer."""

    __slots__ = ("buffer", "capacity", "end", "start")

    def __init__(self, capacity: int = INBOX_BYTES) -> None:
        self.capacity = capacity
        self.buffer = lazy_buffer(capacity)
        self.start = 0
        self.end = 0

    def receive(self, recv_into: Callable[[memoryview], int]) -> int:
        """Bytes received; 0 at the end of the stream, -1 if nothing is there now."""
        try:
            count = recv_into(self.buffer[self.end :])
        except (BlockingIOError, InterruptedError):
            return -1
        self.end += count
        return count

    def take(self, start: int, *, pinned: bool = False) -> None:
        """Bytes before `start` are done with; `pinned`: slices of them are still in use."""
        left = self.end - start
        if pinned:
            self._renew(start, INBOX_BYTES)
        elif not left:
            self.start = self.end = 0
        elif self.capacity - self.end < _LOW_SPACE_BYTES and start:
            self.buffer[:left] = self.buffer[start : self.end]
            self.start, self.end = 0, left
        else:
            self.start = start

    def reserve(self, count: int) -> None:
        """Make room for a message of `count` bytes that begins at `start`."""
        if self.capacity - self.start < count:
            self._renew(self.start, max(count, INBOX_BYTES))

    def _renew(self, start: int, capacity: int) -> None:
        rest = self.buffer[start : self.end]
        capacity = max(capacity, len(rest) + _LOW_SPACE_BYTES)
        self.buffer = lazy_buffer(capacity)
        self.buffer[: len(rest)] = rest
        self.capacity = capacity
        self.start, self.end = 0, len(rest)


class Outbox:
    """Buffers waiting to be sent, in order."""

    __slots__ = ("queue",)

    def __init__(self) -> None:
        self.queue: list[Any] = []

    def flush(self, sendmsg: Callable[[list[Any]], int]) -> bool:
        """Send what the kernel takes; True if nothing is left."""
        queue = self.queue
        while queue:
            part = queue if len(queue) <= IOV_MAX else queue[:IOV_MAX]
            try:
                sent = sendmsg(part)
            except (BlockingIOError, InterruptedError):
                return False
            if sent == sum(map(len, part)):
                del queue[: len(part)]
                continue
            index = 0
            while sent >= len(queue[index]):
                sent -= len(queue[index])
                index += 1
            queue[index] = memoryview(queue[index])[sent:]
            del queue[:index]
            return False
        return True

    def size_bytes(self) -> int:
        """Bytes still waiting."""
        return sum(map(len, self.queue))
