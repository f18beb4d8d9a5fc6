"""Proves what happens while the disk of a member is full: writes wait, trims and reads go on, all
of it continues by itself, and the client never hears of it (rule 12).
"""

from __future__ import annotations

import errno

import pytest

from protocol import replica as wire
from protocol.errors import BlockdError, StateError
from protocol.units import BLOCK_BYTES
from replication import room
from replication.authority import IN_SYNC, OUT
from tests.replication.virtual_replica import Fault
from tests.replication.world import World

BLOCK = b"\xa5" * BLOCK_BYTES
ZEROS = bytes(BLOCK_BYTES)
OTHER = b"\x5a" * BLOCK_BYTES


def full_from(first_block: int) -> Fault:
    """No space for writes from this block on."""

    def fault(operation: int, offset: int, length: int) -> int:
        no_space = operation == wire.WRITE and offset >= first_block * BLOCK_BYTES
        return errno.ENOSPC if no_space else 0

    return fault


def fill(world: World, *uuids: str, first_block: int = 0) -> None:
    for uuid in uuids or world.replicas:
        world.replicas[uuid].fault = full_from(first_block)


@pytest.mark.parametrize("full", [["r0"], ["r1", "r2"], ["r0", "r1", "r2"]])
def test_writes_wait_until_every_member_has_space(full: list[str]) -> None:
    world = World(3)
    fill(world, *full, first_block=8)
    before = world.write(0, BLOCK)
    writes = [world.write((8 + n) * BLOCK_BYTES, BLOCK) for n in range(5)]
    world.settle()
    assert before.error == 0
    assert world.engine.paused
    later = world.write(0, OTHER)
    world.settle()
    assert later.sequences == []  # not even sent: replicas need not keep it
    for uuid in full[:-1]:
        world.make_room(uuid)
        world.settle()
        assert not any(request.answered for request in (*writes, later))
    world.make_room(full[-1])
    world.settle()
    assert [request.error for request in (*writes, later)] == [0] * 6
    assert not world.engine.paused
    assert all(world.state(uuid) == IN_SYNC for uuid in world.replicas)
    world.check_members()


def test_reads_and_trims_go_on_and_an_overlapping_trim_keeps_its_place() -> None:
    world = World(2)
    world.write(0, BLOCK * 4)
    world.settle()
    fill(world, "r1", first_block=10)
    write = world.write(10 * BLOCK_BYTES, BLOCK)
    world.settle()
    trim = world.zero(0, 2 * BLOCK_BYTES)
    overlapping = world.zero(10 * BLOCK_BYTES, BLOCK_BYTES)
    read = world.read(0, 4 * BLOCK_BYTES)
    world.settle()
    assert trim.error == 0
    assert read.result == bytes(2 * BLOCK_BYTES) + BLOCK * 2
    assert not write.answered
    assert not overlapping.answered
    world.make_room("r1")
    world.settle()
    assert (write.error, overlapping.error) == (0, 0)
    assert world.replicas["r1"].block(10) is None
    world.check_members()


def test_a_read_of_blocks_whose_write_waits_is_never_older_than_one_before_it() -> None:
    world = World(2)
    fill(world, "r1", first_block=10)
    write = world.write(10 * BLOCK_BYTES, BLOCK)
    world.read(0, BLOCK_BYTES)
    world.settle()
    reads = []
    for link in world.engine.links.values():
        world.engine.reader = link
        reads.append(world.read(10 * BLOCK_BYTES, BLOCK_BYTES))
        reads.append(world.read(0, BLOCK_BYTES))
    world.settle()
    assert [read.result for read in reads if read.answered] == [BLOCK, ZEROS, ZEROS]
    world.make_room("r1")
    world.settle()
    assert write.error == 0
    assert reads[2].result == BLOCK


def test_extents_wait_for_changes_of_their_blocks() -> None:
    world = World(2)
    fill(world, first_block=10)
    world.write(10 * BLOCK_BYTES, BLOCK)
    world.settle()
    waits, free = world.ask_extents(0, 20 * BLOCK_BYTES), world.ask_extents(0, 5 * BLOCK_BYTES)
    world.settle()
    assert not waits.answered
    assert free.result == [(5, False)]
    for uuid in world.replicas:
        world.make_room(uuid)
    world.settle()
    assert waits.result == [(10, False), (1, True), (9, False)]


def test_a_snapshot_under_way_when_a_disk_fills_up_is_the_same_everywhere() -> None:
    world = World(2)
    fill(world, "r1", first_block=10)
    for uuid in world.replicas:
        world.pipes[uuid].stalled = True
    write = world.write(10 * BLOCK_BYTES, BLOCK)
    outcome = world.snapshot("s")
    trim = world.zero(0, BLOCK_BYTES)
    for uuid in world.replicas:
        world.pipes[uuid].stalled = False
    world.settle()
    assert not trim.answered  # it comes after the snapshot
    assert outcome == []
    world.make_room("r1")
    world.settle()
    assert outcome == [None]
    assert (write.error, trim.error) == (0, 0)
    assert world.replicas["r1"].layers[1].blocks == {10: BLOCK}
    world.check_members()


def test_a_snapshot_or_revert_on_a_full_disk_is_refused_and_deleting_goes_on() -> None:
    world = World(2)
    world.snapshot("old")
    world.settle()
    fill(world, "r1", first_block=10)
    world.write(10 * BLOCK_BYTES, BLOCK)
    world.settle()
    made = world.snapshot("s")
    reverted: list[BlockdError | None] = []
    removed: list[BlockdError | None] = []
    world.structure.revert("old", reverted.append)
    world.structure.remove("old", removed.append)
    world.structure.forget_folded()
    world.settle()
    assert isinstance(made[0], StateError)
    assert "no space" in str(made[0])
    assert isinstance(reverted[0], StateError)
    assert removed == [None]
    world.make_room("r1")
    world.settle()
    world.check_members()


def test_a_rebuild_from_a_full_member_gets_what_waits_there() -> None:
    world = World(3)
    world.lose("r2")
    world.settle()
    for number in range(0, 60, 7):
        world.write(number * BLOCK_BYTES, OTHER)
    world.settle()
    world.reconnect("r2")
    fill(world, "r0", first_block=10)
    writes = [world.write(number * BLOCK_BYTES, BLOCK) for number in (11, 20, 50)]
    world.settle()
    outcome = world.rebuild("r2")
    world.settle()
    world.clock.advance(1)
    world.settle()
    world.make_room("r0")
    world.settle()
    assert outcome == [None]
    assert [write.error for write in writes] == [0, 0, 0]
    world.check_members()


def test_a_trim_that_only_some_members_have_done_is_not_answered() -> None:
    world = World(3)
    fill(world, "r1", "r2", first_block=10)
    world.write(10 * BLOCK_BYTES, BLOCK)
    world.settle()
    world.pipes["r2"].stalled = True
    trim = world.zero(0, BLOCK_BYTES)
    world.settle()
    assert not trim.answered
    world.pipes["r2"].stalled = False
    world.settle()
    assert trim.error == 0


def test_a_full_member_that_is_lost_holds_nothing_up_once_the_record_says_out() -> None:
    world = World(2)
    fill(world, "r1")
    writes = [world.write(n * BLOCK_BYTES, BLOCK) for n in range(2)]
    world.settle()
    writes.append(world.write(5 * BLOCK_BYTES, BLOCK))
    world.lose("r1")
    world.settle()
    assert world.state("r1") == OUT
    assert [write.error for write in writes] == [0, 0, 0]
    world.check_members()


def test_the_last_member_that_is_lost_while_it_is_full_fails_what_waits() -> None:
    world = World(1)
    fill(world)
    writes = [world.write(0, BLOCK)]
    world.settle()
    writes.append(world.write(5 * BLOCK_BYTES, BLOCK))
    world.lose("r0")
    world.settle()
    assert [write.error for write in writes] == [errno.EIO] * 2


def test_a_flush_while_writes_wait_is_about_what_was_answered() -> None:
    world = World(2)
    first = world.write(0, BLOCK)
    world.settle()
    fill(world, "r0")
    second = world.write(BLOCK_BYTES, BLOCK)
    world.settle()
    flush = world.flush()
    world.settle()
    assert (first.error, flush.error) == (0, 0)
    assert not second.answered
    world.make_room("r0")
    world.settle()
    assert second.error == 0
    world.check_members()


def test_a_zone_with_a_change_that_waits_does_not_become_clean() -> None:
    """The stable point of a flush is where the member is, not what it was sent."""
    world = World(2)
    fill(world, "r1")
    write = world.write(0, BLOCK)
    world.settle()
    world.flush()
    world.settle()
    world.make_room("r1")
    world.settle()
    assert write.error == 0
    assert set(world.replicas["r1"].dirty) == {0}


def test_a_member_being_rebuilt_without_space_is_given_up() -> None:
    world = World(2)
    world.lose("r1")
    world.settle()
    world.reconnect("r1")
    world.rebuild("r1")
    world.settle_until(lambda: world.link("r1") in world.engine.targets)
    fill(world, "r1")
    write = world.write(0, BLOCK)
    world.settle()
    assert write.error == 0
    assert not world.engine.paused
    assert world.state("r1") == OUT


def test_a_partial_write_waits_like_any_other() -> None:
    world = World(2)
    fill(world, "r0")
    world.write(0, BLOCK)
    world.settle()
    partial = world.write(BLOCK_BYTES + 5, b"abc")
    long = world.write(8 * BLOCK_BYTES + 5, b"x" * 3 * BLOCK_BYTES)
    world.settle()
    assert not partial.answered
    assert not long.answered
    world.make_room("r0")
    world.settle()
    assert (partial.error, long.error) == (0, 0)
    world.check_members()


def test_clients_are_held_back_while_a_lot_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    fill(world)
    called: list[int] = []
    world.engine.room.on_room = lambda: called.append(1)
    world.write(0, BLOCK)
    world.settle()
    called.clear()
    for n in range(3):
        world.write(n * BLOCK_BYTES, BLOCK)
    assert world.engine.room.waiting_bytes == 3 * BLOCK_BYTES
    world.make_room("r0")
    world.settle()
    assert world.engine.room.waiting_bytes == 0
    assert called
    assert room.WAITING_BYTES_MAX >= 32 << 20


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_while_disks_are_full_members_end_equal(seed: int) -> None:
    world = World(3, seed=seed)
    random = world.random
    for _ in range(25):
        uuid = random.choice(list(world.replicas))
        what = random.random()
        if what < 0.15:
            fill(world, uuid, first_block=random.randrange(40))
        elif what < 0.3:
            world.make_room(uuid)
        elif what < 0.75:
            first, count = random.randrange(60), random.randrange(1, 4)
            world.write(first * BLOCK_BYTES, bytes([random.randrange(256)]) * count * BLOCK_BYTES)
        elif what < 0.9:
            world.zero(random.randrange(60) * BLOCK_BYTES, BLOCK_BYTES * random.randrange(1, 5))
        else:
            world.flush()
        world.steps(random.randrange(20))
    for _ in range(3):
        world.settle(chaotic=True)
        for uuid in world.replicas:
            world.make_room(uuid)
    world.settle()
    assert all(request.error == 0 for request in world.requests)
    world.check_members()
