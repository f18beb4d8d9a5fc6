"""A minimal io_uring: one ring of command entries, submitted in batches by one thread.

The three rings are memory shared with the kernel: an array of entries (SQE, 64 or 128 bytes), the
submission ring, which names entries by their number, and the completion ring (CQE, 16 bytes: user
data, result, flags). Because the submission ring names entries, an entry can belong to one purpose
for good: its owner fills it once, changes what differs, and submits its number again.

Memory order. The kernel reads the submission ring only inside `io_uring_enter`, and posts
completions of a ring made with `deferred` only there too, in the thread that calls it. So
program order is all that is relied on, on any processor: entries first, then the array, then the
tail, then the system call.

Invariants: commands under way <= entries, so neither ring can overflow; a number is not submitted
again before it was reaped. Source: include/uapi/linux/io_uring.h, io_uring_setup(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time
from array import array
from collections.abc import Sequence

SETUP, ENTER, REGISTER = 425, 426, 427  # numbers of the system calls, on all architectures
URING_CMD = 46  # IORING_OP_URING_CMD
COMMAND_AT = 48  # where the payload of a command begins in an entry
CQE_BYTES = 16

_SUBMIT_ALL, _SQE128, _SINGLE_ISSUER, _DEFER_TASKRUN = 1 << 7, 1 << 10, 1 << 12, 1 << 13
_ENTER_GETEVENTS = 1
_REGISTER_EVENTFD = 4
_SQ_AT, _CQ_AT, _SQES_AT = 0, 0x8000000, 0x10000000  # offsets for mmap
_PARAMS_BYTES = 120
_PARAMS = struct.Struct("<30I")
_ENTRY = struct.Struct("<BBHiIIQIIQQ")  # opcode .. fd, cmd_op, 0, addr, len, flags, user_data, 0
_RETRY_SECONDS = 0.001

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_long,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def _call(number: int, first: int, *others: int) -> int:
    """A system call; raises OSError."""
    a, b, c, d, e = (*others, 0, 0, 0, 0, 0)[:5]
    result: int = _syscall(number, first, a, b, c, d, e)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def address_of(memory: mmap.mmap | bytearray) -> int:
    """Where writable memory lies; it must be kept as long as the kernel may use it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Ring:
    """One ring. `entries` is a view of all SQEs; the owner fills them."""

    def __init__(self, count: int, *, wide: bool = False, deferred: bool = False) -> None:
        """`wide`: entries of 128 bytes. `deferred`: completions are posted by `run` only.

        A deferred ring is used by the thread that made it and by no other.
        """
        params = bytearray(_PARAMS_BYTES)
        flags = _SUBMIT_ALL | (_SQE128 if wide else 0)
        flags |= _SINGLE_ISSUER | _DEFER_TASKRUN if deferred else 0
        struct.pack_into("<I", params, 8, flags)
        self.fd = _call(SETUP, count, address_of(params))
        os.set_inheritable(self.fd, False)
        values = _PARAMS.unpack(params)
        sq_count, cq_count = values[0], values[1]
        sq_head, sq_tail, sq_mask, _, _, _, sq_array = values[10:17]
        cq_head, cq_tail, cq_mask, _, _, cqes = values[20:26]
        self.entry_bytes = 128 if wide else 64
        try:
            self._maps = [
                mmap.mmap(self.fd, sq_array + 4 * sq_count, offset=_SQ_AT),
                mmap.mmap(self.fd, cqes + CQE_BYTES * cq_count, offset=_CQ_AT),
                mmap.mmap(self.fd, self.entry_bytes * sq_count, offset=_SQES_AT),
            ]
        except OSError:
            os.close(self.fd)
            raise
        self._sq = memoryview(self._maps[0]).cast("I")
        self._cq = memoryview(self._maps[1]).cast("I")
        self._cqes = memoryview(self._maps[1])[cqes:].cast("q")
        self.entries = memoryview(self._maps[2])
        self.count, self._cq_count = sq_count, cq_count
        self._sq_tail, self._array = sq_tail >> 2, sq_array >> 2
        self._cq_head, self._cq_tail = cq_head >> 2, cq_tail >> 2
        assert self._sq[sq_mask >> 2] == sq_count - 1
        assert self._cq[cq_mask >> 2] == cq_count - 1
        assert self._sq[sq_head >> 2] == 0

    def fill(self, number: int, fd: int, operation: int, payload: bytes) -> None:
        """Make entry `number` a command for `fd`; its user data is the number."""
        at = number * self.entry_bytes
        entry = _ENTRY.pack(URING_CMD, 0, 0, fd, operation, 0, 0, 0, 0, number, 0)
        self.entries[at : at + COMMAND_AT] = entry
        room = self.entry_bytes - COMMAND_AT
        self.entries[at + COMMAND_AT : at + self.entry_bytes] = payload.ljust(room, b"\0")

    def submit(self, numbers: Sequence[int]) -> None:
        """Hand entries to the kernel, all in one call."""
        left = len(numbers)
        tail, mask, sq, begin = self._sq[self._sq_tail], self.count - 1, self._sq, self._array
        first = begin + (tail & mask)
        room = begin + self.count - first
        words = array("I", numbers)
        if left <= room:
            sq[first : first + left] = words
        else:
            sq[first : begin + self.count] = words[:room]
            sq[begin : begin + left - room] = words[room:]
        sq[self._sq_tail] = (tail + left) & 0xFFFFFFFF
        while left:
            try:
                left -= _call(ENTER, self.fd, left)
            except OSError as error:  # EAGAIN: the kernel has no memory for it at the moment
                if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                    raise
                time.sleep(_RETRY_SECONDS)

    def run(self) -> None:
        """Let the kernel post what completions it has; for a deferred ring."""
        while True:
            try:
                _call(ENTER, self.fd, 0, 0, _ENTER_GETEVENTS)
                return
            except InterruptedError:  # what is left would not signal the eventfd again
                continue

    def wait(self) -> None:
        """Wait for a completion."""
        while self._cq[self._cq_head] == self._cq[self._cq_tail]:
            try:
                _call(ENTER, self.fd, 0, 1, _ENTER_GETEVENTS)
            except InterruptedError:
                continue

    def reap(self) -> list[int]:
        """Take all completions: user data and result (and flags, above 32 bits), in turn."""
        cq = self._cq
        head, tail = cq[self._cq_head], cq[self._cq_tail]
        if head == tail:
            return []
        mask = self._cq_count - 1
        first, end = head & mask, ((tail - 1) & mask) + 1
        if first < end:
            found: list[int] = self._cqes[2 * first : 2 * end].tolist()
        else:
            found = self._cqes[2 * first : 2 * self._cq_count].tolist()
            found += self._cqes[: 2 * end].tolist()
        cq[self._cq_head] = tail
        return found

    def notify(self, eventfd: int) -> None:
        """Signal an eventfd whenever there is something to `run` or `reap`."""
        number = array("i", [eventfd])
        _call(REGISTER, self.fd, _REGISTER_EVENTFD, number.buffer_info()[0], 1)

    def close(self) -> None:
        """Cancel what is under way. Views of `entries` must be released before."""
        for view in (self._sq, self._cq, self._cqes, self.entries):
            view.release()
        for memory in self._maps:
            memory.close()
        os.close(self.fd)


def result_of(word: int) -> int:
    """The result in the second word of a completion: a count, or a negative errno."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)
