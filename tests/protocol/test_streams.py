"""Proves that Inbox and Outbox move every byte once and in order for any behaviour of the kernel,
that pinned slices stay as they were, and that memory is bounded.
"""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.streams import INBOX_BYTES, IOV_MAX, Inbox, Outbox


def source(data: bytes, draw: random.Random, largest: int) -> tuple[list[int], object]:
    """A recv_into that returns `data` in random pieces; the list holds the position."""
    position = [0]

    def recv_into(view: memoryview) -> int:
        if draw.random() < 0.2:
            raise BlockingIOError
        count = min(len(view), draw.randrange(1, largest), len(data) - position[0])
        view[:count] = data[position[0] : position[0] + count]
        position[0] += count
        return count

    return position, recv_into


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    sizes=st.lists(st.one_of(st.integers(0, 3000), st.integers(0, 700_000)), max_size=12),
    capacity=st.sampled_from([1 << 12, 1 << 16, INBOX_BYTES]),
)
def test_messages_arrive_whole_and_pinned_slices_do_not_change(
    seed: int, sizes: list[int], capacity: int
) -> None:
    draw = random.Random(seed)
    messages = [struct.pack("<I", size) + draw.randbytes(size) for size in sizes]
    data = b"".join(messages)
    inbox = Inbox(capacity)
    position, recv_into = source(data, draw, 400_000)
    received: list[bytes] = []
    pinned: list[tuple[memoryview, bytes]] = []
    while position[0] < len(data):
        room = inbox.capacity - inbox.end
        assert room > 0, "a full buffer would look like the end of the stream"
        count = inbox.receive(recv_into)  # type: ignore[arg-type]
        assert count != 0
        if count < 0:
            continue
        start = inbox.start
        buffer = memoryview(inbox.buffer)
        slices = []
        need = 4
        while inbox.end - start >= 4:
            need = 4 + struct.unpack_from("<I", buffer, start)[0]
            if inbox.end - start < need:
                break
            slices.append(buffer[start : start + need])
            start += need
            need = 4
        received += [bytes(part) for part in slices]
        pin = bool(slices) and draw.random() < 0.5
        if pin:
            pinned += [(part, bytes(part)) for part in slices]
        inbox.take(start, pinned=pin)
        if inbox.end > inbox.start:
            inbox.reserve(need)
        assert 0 <= inbox.start <= inbox.end <= inbox.capacity
        assert inbox.capacity <= max(sizes) + 4 + INBOX_BYTES + capacity
    assert received == messages
    assert all(bytes(part) == before for part, before in pinned)


def test_the_end_of_the_stream_is_zero_and_nothing_there_is_minus_one() -> None:
    inbox = Inbox(4096)

    def blocked(view: memoryview) -> int:
        raise BlockingIOError

    def interrupted(view: memoryview) -> int:
        raise InterruptedError

    assert inbox.receive(blocked) == inbox.receive(interrupted) == -1
    assert inbox.receive(lambda view: 0) == 0
    assert (inbox.start, inbox.end) == (0, 0)


def test_other_errors_of_the_socket_are_the_callers() -> None:
    def reset(view: memoryview) -> int:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        Inbox(4096).receive(reset)


def test_taking_everything_begins_again_at_the_front_of_the_same_buffer() -> None:
    inbox = Inbox(4096)
    buffer = inbox.buffer
    inbox.receive(lambda view: 100)
    inbox.take(100)
    assert (inbox.start, inbox.end) == (0, 0)
    assert inbox.buffer is buffer


def test_a_slice_kept_over_a_pinned_take_is_not_overwritten() -> None:
    inbox = Inbox(4096)

    def fill(view: memoryview) -> int:
        view[:10] = b"0123456789"
        return 10

    inbox.receive(fill)
    kept = memoryview(inbox.buffer)[:8]
    inbox.take(8, pinned=True)
    for _ in range(3):

        def overwrite(view: memoryview) -> int:
            view[:] = b"x" * len(view)
            return len(view)

        inbox.receive(overwrite)
        inbox.take(inbox.end)
    assert bytes(kept) == b"01234567"


# ---- Outbox -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    parts=st.lists(st.binary(max_size=40), max_size=60),
    largest=st.integers(1, 500),
)
def test_every_byte_is_sent_once_and_in_order(seed: int, parts: list[bytes], largest: int) -> None:
    draw = random.Random(seed)
    outbox = Outbox()
    sent = bytearray()
    queued = 0

    def sendmsg(buffers: list[bytes]) -> int:
        assert 0 < len(buffers) <= IOV_MAX
        if draw.random() < 0.2:
            raise BlockingIOError if draw.random() < 0.5 else InterruptedError
        data = b"".join(bytes(buffer) for buffer in buffers)[: draw.randrange(largest + 1)]
        sent.extend(data)
        return len(data)

    for part in parts:
        outbox.queue.append(part if draw.random() < 0.5 else memoryview(part))
        if draw.random() < 0.3:
            outbox.flush(sendmsg)
        queued += len(part)
        assert outbox.size_bytes() == queued - len(sent)
    while not outbox.flush(sendmsg):
        pass
    assert bytes(sent) == b"".join(parts)
    assert outbox.size_bytes() == 0
    assert outbox.queue == []


def test_more_buffers_than_one_call_takes_leave_in_several() -> None:
    outbox = Outbox()
    calls: list[int] = []
    outbox.queue.extend([b"ab"] * (2 * IOV_MAX + 5))

    def sendmsg(buffers: list[bytes]) -> int:
        calls.append(len(buffers))
        return sum(map(len, buffers))

    assert outbox.flush(sendmsg)
    assert calls == [IOV_MAX, IOV_MAX, 5]


def test_the_queue_stays_the_same_list() -> None:
    outbox = Outbox()
    queue = outbox.queue
    queue.extend([b"abc", b"def"])
    assert not outbox.flush(lambda buffers: 4)
    assert [bytes(part) for part in queue] == [b"ef"]
    assert outbox.size_bytes() == 2
    assert outbox.flush(lambda buffers: 2)
    assert outbox.queue is queue


def test_empty_buffers_and_an_empty_queue_are_no_work_left() -> None:
    outbox = Outbox()
    assert outbox.flush(lambda buffers: 1 // 0)
    outbox.queue.extend([b"", memoryview(b"")])
    assert outbox.flush(lambda buffers: 0)
    assert outbox.queue == []
