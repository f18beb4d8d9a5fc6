"""Proves that commands go through a ring and come back, around its end too, and wake an epoll."""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.kernel.io_uring import Ring, result_of


def _allowed() -> bool:
    try:
        Ring(1).close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _allowed(), reason="this machine does not allow io_uring")
NOP, READ_FIXED_SIZE = 0, 22  # IORING_OP_NOP, IORING_OP_READ


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring(8, deferred=True)
    yield made
    made.close()


def entry(ring: Ring, number: int, operation: int, *fields: int) -> None:
    fd, offset, address, length = fields or (-1, 0, 0, 0)
    head = struct.pack("<BBHiQQIIQ", operation, 0, 0, fd, offset, address, length, 0, number)
    at = number * ring.entry_bytes
    ring.entries[at : at + ring.entry_bytes] = head.ljust(ring.entry_bytes, b"\0")


def test_entries_come_back_in_any_number_around_the_end_of_the_rings(ring: Ring) -> None:
    for number in range(8):
        entry(ring, number, NOP)
    for count in (1, 3, 8, 5, 7, 8, 8, 2, 6) * 3:
        numbers = list(range(8))[-count:]
        ring.submit(numbers)
        ring.run()
        found = ring.reap()
        assert found[::2] == numbers
        assert all(result_of(word) == 0 for word in found[1::2])
    assert ring.reap() == []


def test_a_read_reads_and_an_error_is_a_negative_errno(ring: Ring, tmp_path: Path) -> None:
    from blockd.kernel.io_uring import address_of

    path, buffer = tmp_path / "file", bytearray(16)
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDONLY)
    entry(ring, 0, READ_FIXED_SIZE, fd, 2, address_of(buffer), 16)
    entry(ring, 1, READ_FIXED_SIZE, 99999, 0, address_of(buffer), 16)
    ring.submit([0, 1])
    results: dict[int, int] = {}
    while len(results) < 2:  # the kernel may leave a read to a thread of its own
        ring.run()
        results.update(zip(*[iter(ring.reap())] * 2, strict=True))
    os.close(fd)
    assert result_of(results[0]) == 8
    assert bytes(buffer[:8]) == b"23456789"
    assert result_of(results[1]) == -errno.EBADF


def test_an_eventfd_tells_of_completions_edge_by_edge(ring: Ring) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    ring.notify(eventfd)
    epoll = select.epoll()
    epoll.register(eventfd, select.EPOLLIN | select.EPOLLET)
    for _ in range(3):
        entry(ring, 0, NOP)
        ring.submit([0])
        ring.run()
        assert epoll.poll(5) == [(eventfd, select.EPOLLIN)]
        assert len(ring.reap()) == 2
    assert epoll.poll(0) == []
    epoll.close()
    os.close(eventfd)


def test_a_command_that_a_file_does_not_know_is_refused(tmp_path: Path) -> None:
    wide = Ring(1, wide=True)
    with open(tmp_path / "file", "wb") as file:
        wide.fill(0, file.fileno(), 1, b"x" * 80)
        wide.submit((0,))
        wide.wait()
        assert result_of(wide.reap()[1]) == -errno.EOPNOTSUPP
    wide.close()


def test_closing_leaves_no_descriptor_and_no_mapping() -> None:
    def state() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("io_uring")

    before = state()
    for _ in range(3):
        Ring(64, deferred=True).close()
    assert state() == before
