"""Proves that reads are spread over members, are answered whole when a member dies or lies, and
that no wrong byte reaches a client whatever a replica sends (rule 13).
"""

from __future__ import annotations

import errno
import struct

import pytest

from protocol import replica as wire
from protocol.checksum import block_checksums, crc32c
from protocol.errors import PeerError
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication.engine import EXTENTS_BLOCKS_MAX
from replication.reading import BATCHES_PER_TURN
from tests.replication.world import Request, World


def filled(count: int = 3, size_bytes: int = 64 * BLOCK_BYTES) -> World:
    """A world whose blocks 0, 2, 4, ... hold random data."""
    world = World(count, size_bytes=size_bytes)
    for number in range(0, min(64, size_bytes // BLOCK_BYTES), 2):
        world.write(number * BLOCK_BYTES, world.random.randbytes(BLOCK_BYTES))
    world.settle()
    return world


def test_batches_of_reads_are_spread_over_all_members() -> None:
    world = filled()
    world.read(0, BLOCK_BYTES)  # waits for the read lease
    world.settle()
    before = [replica.reads for replica in world.replicas.values()]
    for _ in range(3 * BATCHES_PER_TURN):
        world.engine.next_turn()
        world.read(0, BLOCK_BYTES)
    world.settle()
    reads = [replica.reads for replica in world.replicas.values()]
    assert [after - a for after, a in zip(reads, before, strict=True)] == [BATCHES_PER_TURN] * 3


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (4095, 2),
        (1, 4096),
        (100, 30 * BLOCK_BYTES),
        (BLOCK_BYTES - 1, BLOCK_BYTES),
        (63 * BLOCK_BYTES, BLOCK_BYTES),
        (63 * BLOCK_BYTES + 17, BLOCK_BYTES - 17),
    ],
)
def test_a_read_of_any_range_returns_its_bytes(offset: int, length: int) -> None:
    world = filled()
    read = world.read(offset, length)
    world.settle()
    assert read.result == bytes(world.model[offset : offset + length])


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, PIECE_BYTES_MAX + 1),
        (0, 3 * PIECE_BYTES_MAX),
        (5, 2 * PIECE_BYTES_MAX),
        (BLOCK_BYTES - 1, PIECE_BYTES_MAX + 2),
    ],
)
def test_a_read_longer_than_a_piece_is_put_together(offset: int, length: int) -> None:
    world = filled(size_bytes=4 << 20)
    for replica in world.replicas.values():
        replica.defers = True
    world.write(PIECE_BYTES_MAX - 7, world.random.randbytes(100))
    world.settle()
    read = world.read(offset, length)
    world.settle(chaotic=True)
    assert read.result == bytes(world.model[offset : offset + length])
    world.check_order()


@pytest.mark.parametrize("lead", [1, 512, 4095])
def test_a_read_of_one_piece_that_is_not_aligned_stays_within_the_limit(lead: int) -> None:
    world = filled(size_bytes=4 << 20)
    read = world.read(lead, PIECE_BYTES_MAX)
    world.settle()
    assert read.result == bytes(world.model[lead : lead + PIECE_BYTES_MAX])
    world.check_order()


def test_reads_under_way_are_served_by_others_when_their_member_dies() -> None:
    world = filled(size_bytes=4 << 20)
    for pipe in world.pipes.values():
        pipe.stalled = True
    reads = []
    for _ in range(6):
        world.engine.next_turn()
        reads.append(world.read(10, 2 * PIECE_BYTES_MAX))
        reads.append(world.read(0, 4 * BLOCK_BYTES))
    world.lose("r0")
    for pipe in world.pipes.values():
        pipe.stalled = False
    world.settle()
    for read in reads:
        assert read.result == bytes(world.model[read.offset : read.offset + read.length])


def test_a_read_cut_off_in_the_middle_of_its_answer_is_served_whole() -> None:
    world = filled()
    read = world.read(0, 8 * BLOCK_BYTES)
    world.settle_until(lambda: any(link.reads for link in world.engine.links.values()))
    (reader,) = [link for link in world.engine.links.values() if link.reads]
    pipe = world.pipes[reader.replica_uuid]
    world.settle_until(lambda: bool(pipe.to_volume))
    for _ in range(3):
        world._answer(pipe, 5000)
    assert not read.answered
    world.lose(reader.replica_uuid)
    world.settle()
    assert read.result == bytes(world.model[: 8 * BLOCK_BYTES])


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_bad_block_is_read_from_another_member(first: int) -> None:
    world = filled()
    world.engine.reader = world.engine.readers[first]
    bad = [*world.replicas.values()][first]
    bad.corrupt = {2}
    reads = [world.read(2 * BLOCK_BYTES, BLOCK_BYTES), world.read(0, 5 * BLOCK_BYTES)]
    world.settle()
    for read in reads:
        assert read.result == bytes(world.model[read.offset : read.offset + read.length])
    assert world.engine.checksum_errors >= 1


@pytest.mark.parametrize(
    ("first", "good"),
    [
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 2),
        pytest.param(
            2,
            0,
            marks=[],
        ),
        pytest.param(
            2,
            1,
        ),
    ],
)
def test_the_only_good_copy_of_a_block_is_found(first: int, good: int) -> None:
    world = filled()
    replicas = [*world.replicas.values()]
    world.engine.reader = world.engine.readers[first]
    for index, replica in enumerate(replicas):
        replica.corrupt = set() if index == good else {2}
    read = world.read(2 * BLOCK_BYTES, BLOCK_BYTES)
    world.settle()
    assert read.result == bytes(world.model[2 * BLOCK_BYTES : 3 * BLOCK_BYTES])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_block_without_a_good_copy_is_an_error_and_never_wrong_bytes(count: int) -> None:
    world = filled(count)
    for replica in world.replicas.values():
        replica.corrupt = {2}
    reads = [
        world.read(2 * BLOCK_BYTES, BLOCK_BYTES),
        world.read(0, 5 * BLOCK_BYTES),
        world.read(2 * BLOCK_BYTES + 1, 1),
    ]
    write = world.write(2 * BLOCK_BYTES + 1, b"x")
    world.settle()
    assert [read.error for read in reads] == [errno.EIO] * 3
    assert write.error == errno.EIO
    world.check_order()


def test_a_member_that_refuses_a_read_is_passed_over() -> None:
    world = filled()
    world.replicas["r0"].fault = lambda operation, offset, length: (
        errno.EIO if operation == wire.READ else 0
    )
    reads = []
    for _ in range(3):
        world.engine.next_turn()
        reads.append(world.read(0, BLOCK_BYTES))
    world.settle()
    assert all(read.result == bytes(world.model[:BLOCK_BYTES]) for read in reads)


def test_a_snapshot_is_read_by_its_layer() -> None:
    world = filled()
    before = bytes(world.model)
    outcome = world.snapshot("one")
    world.settle()
    world.write(0, b"\x99" * BLOCK_BYTES)
    world.settle()
    read = world.read(0, 5 * BLOCK_BYTES, layer_id=1)
    world.settle()
    assert outcome == [None]
    assert read.result == before[: 5 * BLOCK_BYTES]


# ---- reads that go together ---------------------------------------------------------------------

RANGES = [(0, 1), (2, 1), (4, 1), (0, 5), (1, 1), (6, 2), (8, 1), (62, 2), (10, 1), (3, 1)]


def check_reads(world: World, reads: list[Request]) -> None:
    world.settle()
    for read in reads:
        assert read.result == bytes(world.model[read.offset : read.offset + read.length])
    world.check_order()


def test_reads_that_go_together_are_one_message() -> None:
    world = filled(1)
    reads = world.read_blocks(RANGES)
    (message,) = world.link("r0").queue
    assert len(message) == wire.HEADER_BYTES + 8 * len(RANGES)
    check_reads(world, reads)


@pytest.mark.parametrize("seed", range(20))
def test_reads_that_go_together_are_answered_in_parts_and_in_any_order(seed: int) -> None:
    world = World(2, seed=seed, size_bytes=64 * BLOCK_BYTES)
    for number in range(0, 64, 2):
        world.write(number * BLOCK_BYTES, world.random.randbytes(BLOCK_BYTES))
    world.settle()
    for replica in world.replicas.values():
        replica.defers = True
    reads = world.read_blocks(RANGES)
    world.steps(world.random.randrange(25))
    for replica in world.replicas.values():
        replica.defers = False
    if seed % 2:
        world.lose("r0")
    check_reads(world, reads)
    assert not any(link.reads for link in world.engine.links.values() if link.connected)


def test_one_bad_block_among_reads_that_go_together_is_read_elsewhere() -> None:
    world = filled()
    bad = world.engine.reader
    assert bad is not None
    world.replicas[bad.replica_uuid].corrupt = {2}
    check_reads(world, world.read_blocks(RANGES))
    assert world.engine.checksum_errors == 2  # block 2 alone, and blocks 0 to 4


def test_refused_reads_among_others_are_asked_of_another_member() -> None:
    world = filled()
    for replica in list(world.replicas.values())[:2]:
        replica.fault = lambda operation, offset, length: (
            errno.EIO if operation == wire.READ and offset in (0, 4 * BLOCK_BYTES) else 0
        )
    check_reads(world, world.read_blocks(RANGES))


def test_more_reads_than_fit_one_message_are_several() -> None:
    world = filled(1)
    reads = world.read_blocks([(number % 64, 1) for number in range(2 * wire.READS_MAX + 7)])
    assert len(world.link("r0").queue) == 3
    check_reads(world, reads)


def test_an_answer_that_covers_reads_of_two_messages_breaks_the_session() -> None:
    world = World(1)
    reads = [*world.read_blocks([(0, 1), (1, 1)]), *world.read_blocks([(2, 1)])]
    with pytest.raises(PeerError):
        answer_with(world, wire.DATA, 1, 3, struct.pack("<3I", 3, 3, 3) + 3 * ROOM)
    check_reads(world, reads)


def test_a_read_answered_twice_breaks_the_session() -> None:
    world = World(1)
    (read,) = world.read_blocks([(0, 1)])
    answer_with(world, wire.DATA, 1, 1, struct.pack("<I", 3) + ROOM)
    with pytest.raises(PeerError):
        answer_with(world, wire.DATA, 1, 1, struct.pack("<I", 3) + ROOM)
    assert read.answers == 1


# ---- extents ----------------------------------------------------------------------------------


def test_extents_name_blocks_with_data() -> None:
    world = filled()
    asked = world.ask_extents(0, 5 * BLOCK_BYTES)
    partly = world.ask_extents(BLOCK_BYTES + 1, BLOCK_BYTES)
    world.settle()
    assert asked.result == [(1, True), (1, False), (1, True), (1, False), (1, True)]
    assert partly.result == [(1, False), (1, True)]


def test_extents_are_asked_of_another_member_when_one_dies() -> None:
    world = filled(2)
    for pipe in world.pipes.values():
        pipe.stalled = True
    asked = world.ask_extents(0, 2 * BLOCK_BYTES)
    (asking,) = [link for link in world.engine.links.values() if link.calls]
    world.lose(asking.replica_uuid)
    for pipe in world.pipes.values():
        pipe.stalled = False
    world.settle()
    assert asked.result == [(1, True), (1, False)]


def test_extents_of_more_than_the_limit_are_cut_at_it() -> None:
    world = World(1)
    world.engine.extents(world, 0, 0, 4 * EXTENTS_BLOCKS_MAX * BLOCK_BYTES)
    (head,) = world.link("r0").queue
    frames: list[wire.Frame] = []
    wire.parse(bytearray(head), memoryview(head), 0, len(head), frames)
    assert frames[0][2] == EXTENTS_BLOCKS_MAX * BLOCK_BYTES


# ---- answers a replica must not give ------------------------------------------------------------


def answer_with(world: World, operation: int, sequence: int, count: int, payload: bytes) -> None:
    """An answer to `count` reads, or another one."""
    covered = crc32c(payload) if operation in (wire.ANSWER, wire.EXTENT_LIST) else 0
    size = len(payload)
    head = wire.frame(operation, sequence, length=covered, argument=count, payload_bytes=size)
    view = memoryview(head + payload)
    frames: list[wire.Frame] = []
    wire.parse(view, view, 0, len(view), frames)
    world.engine.received(world.link("r0"), frames)


ROOM = bytes(wire.HEADROOM_BYTES)


def data_payload(*blocks: bytes) -> bytes:
    """Of one range."""
    entries = block_checksums(memoryview(b"".join(blocks)))
    return struct.pack(f"<{len(entries)}I", *entries) + ROOM + b"".join(blocks)


@pytest.mark.parametrize(
    ("operation", "sequence"),
    [
        (wire.DATA, 99),
        (wire.FLUSHED, 99),
        (wire.ANSWER, 0),
        (wire.APPLIED, 99),
        (250, 1),
    ],
)
def test_an_answer_to_nothing_asked_breaks_the_session(operation: int, sequence: int) -> None:
    world = World(1)
    world.read(0, BLOCK_BYTES)
    with pytest.raises(PeerError):
        answer_with(world, operation, sequence, 1, b"")


def test_applied_never_goes_back() -> None:
    world = World(1)
    world.pipes["r0"].muted = True
    world.write(0, bytes(BLOCK_BYTES))
    world.write(0, bytes(BLOCK_BYTES))
    world.settle()
    answer_with(world, wire.APPLIED, 2, 0, b"")
    with pytest.raises(PeerError):
        answer_with(world, wire.APPLIED, 1, 0, b"")


@pytest.mark.parametrize(
    ("count", "payload"),
    [
        (1, b"123"),  # shorter than its map
        (1, data_payload(b"a" * BLOCK_BYTES)),  # less than asked, and consistent
        (1, data_payload(*[b"a" * BLOCK_BYTES] * 3)),  # more than asked
        (1, data_payload(*[b"a" * BLOCK_BYTES] * 2) + b"z"),
        (2, data_payload(*[b"a" * BLOCK_BYTES] * 2)),  # answers to more reads than were asked
        (0, data_payload(*[b"a" * BLOCK_BYTES] * 2)),
        (1, b""),
        (1, b"1234"),
        (1, data_payload(b"a" * BLOCK_BYTES, b"b" * BLOCK_BYTES)[:8] + b"a" * 2 * BLOCK_BYTES),
    ],
)
def test_data_of_another_shape_than_asked_is_not_passed_on(count: int, payload: bytes) -> None:
    world = World(1)
    read = world.read(0, 2 * BLOCK_BYTES)
    try:
        answer_with(world, wire.DATA, 1, count, payload)
    except PeerError:
        return
    assert read.error == errno.EIO


@pytest.mark.parametrize("payload", [b"123", b"1234", b"1234567", b"x" * 12])
def test_extents_of_a_wrong_shape_are_not_passed_on(payload: bytes) -> None:
    world = World(1)
    asked = world.ask_extents(0, BLOCK_BYTES)
    try:
        answer_with(world, wire.EXTENT_LIST, 1, 0, payload)
    except PeerError:
        return
    assert asked.error == errno.EIO
