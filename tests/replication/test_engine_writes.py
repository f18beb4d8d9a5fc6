"""Proves when a write is answered: after every target applied it, and after the record says OUT for
those that did not; and what the client hears when nothing can be written (rules 2, 3, 8).
"""

from __future__ import annotations

import errno
from dataclasses import replace

from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication import membership
from replication.authority import IN_SYNC, OUT
from replication.lease import LEASE_SECONDS
from replication.ledger import RETRY_SECONDS
from tests.replication.world import VOLUME, World

BLOCK = b"\xa5" * BLOCK_BYTES


def test_a_write_is_answered_only_after_the_last_member_applied_it() -> None:
    world = World(3)
    world.pipes["r1"].stalled = True
    write = world.write(0, BLOCK)
    world.settle()
    assert world.replicas["r0"].block(0) == world.replicas["r2"].block(0) == BLOCK
    assert not write.answered
    world.pipes["r1"].stalled = False
    world.settle()
    assert write.error == 0
    world.check_members()


def test_a_write_applied_everywhere_waits_for_the_slowest_answer() -> None:
    world = World(2)
    world.pipes["r1"].muted = True
    write = world.write(0, BLOCK)
    world.settle()
    assert world.replicas["r1"].block(0) == BLOCK
    assert not write.answered
    world.pipes["r1"].muted = False
    world.settle()
    assert write.error == 0


def test_a_lost_member_holds_answers_until_the_record_says_out() -> None:
    world = World(3)
    world.pipes["r2"].stalled = True
    write = world.write(0, BLOCK)
    world.lose("r2")
    jobs, world.clock.jobs = world.clock.jobs, []
    world.settle()  # everything but the authority goes on
    assert world.replicas["r0"].block(0) == world.replicas["r1"].block(0) == BLOCK
    world.clock.jobs = jobs
    assert world.state("r2") == IN_SYNC
    assert not write.answered
    world.settle()
    assert world.state("r2") == OUT
    assert write.error == 0
    world.check_members()


def test_answers_are_held_while_the_authority_is_away_and_go_on_after_it() -> None:
    world = World(2)
    world.authority.away = True
    world.lose("r1")
    writes = [world.write(n * BLOCK_BYTES, BLOCK) for n in range(3)]
    world.settle()
    for _ in range(3):
        world.clock.advance(RETRY_SECONDS)
        world.settle()
    assert world.ledger.held
    assert not any(write.answered for write in writes)
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert world.ledger.held is None
    assert [write.error for write in writes] == [0, 0, 0]
    assert world.state("r1") == OUT
    world.check_members()


def test_reads_go_on_while_answers_are_held_until_the_lease_ends() -> None:
    world = World(2)
    world.read(0, BLOCK_BYTES)
    world.settle()
    world.authority.away = True
    world.lose("r1")
    write = world.write(0, BLOCK)
    read = world.read(0, BLOCK_BYTES)
    world.settle()
    assert not write.answered
    assert read.result == BLOCK
    world.clock.advance(LEASE_SECONDS)
    late = world.read(0, BLOCK_BYTES)
    world.settle()
    assert not late.answered  # r1 may belong to a new owner by now
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert write.error == 0
    assert late.result == BLOCK


def test_a_change_by_somebody_else_is_merged_with_ours() -> None:
    world = World(3)
    world.authority.edit(VOLUME, lambda record: replace(record, config_seq=record.config_seq + 7))
    world.lose("r2")
    write = world.write(0, BLOCK)
    world.settle()
    assert write.error == 0
    assert world.state("r2") == OUT
    assert world.authority.records[VOLUME].config_seq == 8
    assert world.fenced == []


def test_a_record_with_another_epoch_fences_this_owner_which_answers_nothing_more() -> None:
    world = World(2)
    world.authority.edit(VOLUME, lambda record: replace(record, epoch=record.epoch + 1))
    write = world.write(0, BLOCK)
    world.lose("r1")
    world.settle()
    world.clock.advance(10 * RETRY_SECONDS)
    world.settle()
    assert len(world.fenced) == 1
    assert "epoch 2" in world.fenced[0]
    assert not write.answered
    assert world.state("r1") == IN_SYNC


def test_a_deleted_record_fences_this_owner() -> None:
    world = World(2)
    world.authority.delete(VOLUME)
    write = world.write(0, BLOCK)
    world.lose("r1")
    world.settle()
    assert len(world.fenced) == 1
    assert not write.answered


def test_the_last_member_in_sync_is_never_out_and_requests_fail() -> None:
    world = World(3)
    for uuid in ("r0", "r1"):
        world.lose(uuid)
        world.settle()
    world.pipes["r2"].stalled = True
    pending = [world.write(0, BLOCK), world.read(0, 10), world.flush(), world.write(1, b"part")]
    world.lose("r2")
    world.settle()
    assert [request.error for request in pending] == [errno.EIO] * 4
    assert [world.state(uuid) for uuid in ("r0", "r1", "r2")] == [OUT, OUT, IN_SYNC]
    later = [world.read(0, 10), world.flush(), world.ask_extents(0, BLOCK_BYTES)]
    later.append(world.write(1, b"part"))
    world.settle()
    assert [request.error for request in later] == [errno.EIO] * 4


def test_a_write_without_any_member_fails_at_once() -> None:
    world = World(1)
    world.lose("r0")
    requests = [
        world.write(0, BLOCK),
        world.zero(0, BLOCK_BYTES),
        world.write(0, bytes(2 * PIECE_BYTES_MAX)),
        world.zero(10, 3 * BLOCK_BYTES),
    ]
    world.settle()
    assert [request.error for request in requests] == [errno.EIO] * 4


def test_a_write_made_while_no_member_was_there_is_not_answered_well_when_one_returns() -> None:
    world = World(1)
    world.lose("r0")
    write = world.write(0, BLOCK)
    assert world.reconnect("r0")
    world.settle()
    assert write.error != 0  # the world itself objects to an answer without a member


def test_a_write_that_waited_for_a_lock_when_the_last_member_died_fails() -> None:
    world = World(2)
    world.write(0, BLOCK)
    world.settle()
    world.lose("r1")
    world.settle()
    assert world.reconnect("r1")
    world.rebuild("r1")
    world.settle_until(lambda: bool(world.engine.locks.held))
    world.pipes["r1"].stalled = True
    world.settle()  # the region was read, but not written yet
    write = world.write(0, BLOCK)
    world.lose("r0")
    world.settle()
    assert write.error == errno.EIO


def test_the_last_member_comes_back_and_serves_again() -> None:
    world = World(2)
    before = world.write(0, BLOCK)
    world.settle()
    world.lose("r1")
    world.settle()
    world.lose("r0")
    world.settle()
    assert world.reconnect("r0")
    after = world.write(BLOCK_BYTES, BLOCK)
    read = world.read(0, 2 * BLOCK_BYTES)
    world.settle()
    assert (before.error, after.error, read.result) == (0, 0, BLOCK + BLOCK)


def test_a_member_on_its_way_out_cannot_come_back_before_the_record_says_so() -> None:
    world = World(2)
    world.authority.away = True
    world.pipes["r0"].stalled = True
    failed = world.write(0, BLOCK)
    world.settle()
    world.lose("r0")
    world.lose("r1")
    assert failed.error == errno.EIO
    world.settle()
    world.reconnect("r0")
    world.reconnect("r1")
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    record = world.authority.records[VOLUME]
    for link in world.engine.readers:
        assert record.members[link.replica_uuid].state == IN_SYNC
    write = world.write(BLOCK_BYTES, BLOCK)
    world.settle()
    assert write.answered


def test_a_returned_last_member_waits_until_the_others_are_recorded_out() -> None:
    world = World(2)
    world.authority.away = True
    world.lose("r0")
    world.lose("r1")
    world.settle()
    world.reconnect("r1", wait=False)
    world.settle()
    write = world.write(0, BLOCK)  # the world objects to an answer that r0 does not know of
    world.settle()
    assert write.error != 0
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert world.state("r0") == OUT
    write = world.write(0, BLOCK)
    world.settle()
    assert write.error == 0


def test_a_lost_member_that_must_stay_in_the_record_fails_requests_instead_of_hanging() -> None:
    """Another member was taken out of the record before this one's failure was recorded."""
    world = World(2)
    world.authority.away = True
    world.ledger.change(lambda record: record.with_state("r1", OUT), lambda error: None)
    world.lose("r0")
    write = world.write(0, BLOCK)
    world.settle()
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert world.state("r0") == IN_SYNC
    assert write.error == errno.EIO


def test_a_member_that_refuses_a_write_for_another_reason_goes_out() -> None:
    world = World(3)
    world.replicas["r1"].fault = lambda operation, offset, length: errno.EIO
    writes = [world.write(n * BLOCK_BYTES, BLOCK) for n in range(3)]
    world.settle()
    assert [write.error for write in writes] == [0, 0, 0]
    assert world.state("r1") == OUT
    world.check_members()


def test_a_new_member_counts_only_for_writes_after_it_entered() -> None:
    world = World(1)
    world.pipes["r0"].muted = True
    write = world.write(0, BLOCK)
    world.settle()
    world.lose("r0")
    world.settle()
    assert write.error == errno.EIO
    assert world.reconnect("r0")
    second = world.write(0, BLOCK)
    assert not second.answered
    world.settle()
    assert second.error == 0


def test_long_writes_and_zeros_reach_all_members_in_pieces() -> None:
    size = 80 << 20
    world = World(2, size_bytes=size)
    data = bytes(range(256)) * (3 * PIECE_BYTES_MAX // 256) + b"tail"
    write = world.write(BLOCK_BYTES + 1, data)
    zero = world.zero(2 * BLOCK_BYTES + 5, size - 3 * BLOCK_BYTES)
    world.settle()
    assert (write.error, zero.error) == (0, 0)
    assert max(len(replica.order) for replica in world.replicas.values()) > 4
    world.check_order()
    read = world.read(0, PIECE_BYTES_MAX)
    world.settle()
    assert read.result == bytes(world.model[:PIECE_BYTES_MAX])


def test_the_members_function_ignores_a_second_failure_of_the_same_link() -> None:
    world = World(2)
    link = world.link("r1")
    world.lose("r1")
    membership.fail(world.engine, link, "again")
    world.settle()
    swaps = [record for record in world.authority.history if record.members["r1"].state == OUT]
    assert len(swaps) == 1
