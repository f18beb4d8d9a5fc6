"""Reads that do not wait, reads in a thread, and what a read returns.

A thread's read races with the event loop and is believed only if it is consistent in itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import crcmod.predefined
import pytest

from protocol.checksum import ZEROS, block_checksum, block_checksums
from snapshots.readpath import AGAIN
from tests.snapshots.model import REGION, Model, fill, write


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "replica")


def in_thread(function: Callable[[], Any]) -> Any:
    """The result of a function called in another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_checksums_are_crc32c_as_an_independent_implementation_computes_it() -> None:
    oracle = crcmod.predefined.mkPredefinedCrcFun("crc-32c")
    assert oracle(b"123456789") == 0xE3069283  # RFC 3720 uses the same polynomial
    random = Random(1)
    for _ in range(20):
        block = random.randbytes(4096)
        crc = oracle(block)
        assert block_checksum(block) == (crc if crc > 3 else crc + 4)
        assert block_checksums(memoryview(block * 2)) == [block_checksum(block)] * 2


def test_a_read_returns_entries_and_then_the_data_of_blocks_that_are_not_zeros(
    model: Model,
) -> None:
    model.write(REGION - 1, [1, 2])
    model.write(REGION + 2, [3])
    target = memoryview(bytearray(5 * 4100))
    used = model.replica.read_into(REGION - 1, 5, target)
    assert used == 5 * 4 + 3 * 4096
    assert list(target[:20].cast("I")) == [
        block_checksum(fill(1)),
        block_checksum(fill(2)),
        ZEROS,
        block_checksum(fill(3)),
        ZEROS,
    ]
    assert target[20:used] == fill(1) + fill(2) + fill(3)


def cold(*offsets: int) -> Callable[..., int]:
    """preadv of a machine that has these file offsets not in memory; all, if none are named."""
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and (offset in offsets or not offsets):
            raise BlockingIOError
        return real(fd, buffers, offset, flags)

    return preadv


def test_a_read_that_would_block_says_so_and_succeeds_in_a_thread(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.write(0, [1, 2])
    sealed = model.seal()
    model.reopen()
    target = memoryview(bytearray(2 * 4100))
    replica = model.replica
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", cold())
        for layer_id in (0, sealed):
            for count in (1, 2):
                assert replica.read_ranges([0], [count], target, layer_id) == (0, 0)
                read = replica.read_into
                assert in_thread(lambda: read(0, count, target, layer_id)) == count * 4100  # noqa: B023
    for layer_id in (0, sealed):
        assert replica.read_ranges([0], [1], target, layer_id) == (1, 4100)
        assert target[4:4100] == fill(1)


@pytest.mark.parametrize("seed", range(30))
def test_ranges_that_are_read_together_are_what_each_of_them_is(model: Model, seed: int) -> None:
    random = Random(seed)
    for _ in range(40):
        model.write(random.randrange(2 * REGION - 4), [random.randrange(5) for _ in range(4)])
    sealed = model.seal()
    for _ in range(20):
        model.write(random.randrange(2 * REGION - 4), [random.randrange(5) for _ in range(4)])
    firsts = [random.randrange(2 * REGION - 8) for _ in range(20)]
    counts = [random.choice((1, 1, 1, 2, 8)) for _ in firsts]
    target = memoryview(bytearray(sum(counts) * 4100))
    for layer_id in (0, sealed):
        entries, data = b"", b""
        for first, count in zip(firsts, counts, strict=True):
            one = memoryview(bytearray(count * 4100))
            used = model.replica.read_into(first, count, one, layer_id)
            entries += one[: 4 * count]
            data += one[4 * count : used]
        done, used = model.replica.read_ranges(firsts, counts, target, layer_id)
        assert done == len(firsts)
        assert target[:used] == entries + data


def test_single_blocks_are_read_until_one_has_no_data_or_is_not_in_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.write(0, [1, 2, 3])
    model.seal()
    model.write(3, [4])
    arena = memoryview(bytearray(4 * 4096))
    vectors = [(arena[at : at + 4096],) for at in range(0, 4 * 4096, 4096)]
    replica = model.replica
    assert replica.read_blocks([3, 0, 2], vectors) == [block_checksum(fill(n)) for n in (4, 1, 3)]
    assert arena[: 3 * 4096] == fill(4) + fill(1) + fill(3)
    assert replica.read_blocks([1, 9, 2], vectors) == [block_checksum(fill(2))]  # 9: no data
    assert replica.read_blocks([REGION * 2 - 1], vectors) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", cold(2 * 4096))  # block 0
        assert replica.read_blocks([3, 0], vectors) == [block_checksum(fill(4))]


@pytest.mark.parametrize("headroom", [0, 28])
def test_ranges_have_room_before_the_data_of_each(model: Model, headroom: int) -> None:
    model.write(0, [1, 2, 3])
    target = memoryview(bytearray(6 * 4100 + 3 * 28))
    done, used = model.replica.read_ranges([0, 9, 1], [1, 1, 3], target, 0, headroom)
    room = bytes(headroom)
    expected = room + fill(1) + room + room + fill(2) + fill(3)
    assert (done, used) == (3, 20 + len(expected))
    assert target[20:used] == expected


@pytest.mark.parametrize("bad", range(5))
def test_ranges_before_one_that_is_not_in_memory_are_read(
    model: Model, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.write(0, [1, 2, 3, 4, 5, 6])
    firsts, counts = [5, 1, 9, 2, 4], [1, 1, 1, 2, 1]  # block 9 was never written
    alone = memoryview(bytearray(8 * 4100))
    _, used = model.replica.read_ranges(firsts[:bad], counts[:bad], alone)
    target = memoryview(bytearray(b"\xee" * (8 * 4100)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", cold((firsts[bad] + 2) << 12))
        expected = (bad, used) if bad != 2 else (5, 6 * 4 + 5 * 4096)  # zeros need no disk
        assert model.replica.read_ranges(firsts, counts, target) == expected
    if bad != 2:
        assert target[:used] == alone[:used]


def test_a_thread_does_not_believe_a_block_that_does_not_match_its_entry(model: Model) -> None:
    model.write(0, [1])
    target = memoryview(bytearray(4100))
    os.pwrite(model.replica.head.fd, fill(2), 2 * 4096)  # as if a write were half done
    assert in_thread(lambda: model.replica.read_into(0, 1, target)) == AGAIN
    assert model.replica.read_into(0, 1, target) == 4100  # the consumer compares and sees it


def test_a_thread_does_not_believe_a_read_during_which_the_layers_changed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.write(0, [1])
    target = memoryview(bytearray(4100))
    replica = model.replica
    read_range = replica._read_range

    def interrupted(*arguments: Any) -> int:
        used = read_range(*arguments)
        replica.layers_changed()  # what a slot number means may be different now
        return used

    monkeypatch.setattr(replica, "_read_range", interrupted)
    assert in_thread(lambda: replica.read_into(0, 1, target)) == AGAIN


def test_reads_in_a_thread_are_right_while_everything_changes(model: Model) -> None:
    random = Random(3)
    replica = model.replica
    stop = threading.Event()
    wrong: list[str] = []
    good = [0]

    def reader() -> None:
        try:
            read_until_stopped()
        except Exception as error:
            wrong.append(repr(error))

    def read_until_stopped() -> None:
        target = memoryview(bytearray(8 * 4100))
        while not stop.is_set():
            used = replica.read_into(REGION - 4, 8, target)
            if used == AGAIN:
                continue
            position = 32
            for number, entry in enumerate(target[:32].cast("I")):
                if entry == ZEROS:
                    wrong.append(f"block {number} reads as zeros")
                    continue
                value = int.from_bytes(target[position : position + 4], "little")
                if value % 8 != number:
                    wrong.append(f"block {number} holds {value}")
                position += 4096
            good[0] += 1

    write(replica, REGION - 4, [8 + number for number in range(8)])
    thread = threading.Thread(target=reader)
    thread.start()
    for turn in range(300):
        number = random.randrange(8)
        write(replica, REGION - 4 + number, [8 * (turn + 2) + number])
        if turn % 10 == 0:
            replica.seal(turn + 2, f"s{turn}", "", {})
        if turn % 25 == 24:
            sealed = [layer for layer in replica.tree() if layer.name and not layer.removed]
            replica.remove(random.choice(sealed).id)
        if turn % 60 == 59:
            sealed = [layer for layer in replica.tree() if layer.name and not layer.removed]
            replica.revert(random.choice(sealed).id, 10_000 + turn)
        if turn % 3 == 0:
            replica.maintain(3)
    stop.set()
    thread.join()
    assert wrong == []
    assert good[0] > 10


def test_extents_are_merged_and_limited(model: Model) -> None:
    model.write(REGION - 2, [1, 2, 3])
    model.write(REGION + 4, [1])
    end = REGION + 8
    assert model.replica.extents(0, end) == [
        (REGION - 2, False),
        (3, True),
        (3, False),
        (1, True),
        (3, False),
    ]
    assert model.replica.extents(0, end, limit=2) == [(REGION - 2, False), (3, True)]
    assert model.replica.extents(REGION - 1, 2) == [(2, True)]
