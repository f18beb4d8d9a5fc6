"""Proves FLUSH and FUA: answered after fdatasync succeeded on all targets, covering every write
answered before; a failed one is never retried and believed (rule 5).
"""

from __future__ import annotations

import errno

import pytest

from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication.authority import IN_SYNC, OUT
from tests.replication.world import Request, World

BLOCK = b"\x17" * BLOCK_BYTES


def durable_everywhere(world: World, request: Request) -> bool:
    """Have all members that count made the request's operations durable?"""
    return all(
        replica.durable >= max(request.sequences)
        for uuid, replica in world.replicas.items()
        if world.state(uuid) != OUT
    )


def test_a_flush_waits_for_every_member() -> None:
    world = World(3)
    write = world.write(0, BLOCK)
    world.settle()
    world.pipes["r1"].stalled = True
    flush = world.flush()
    world.settle()
    assert world.replicas["r0"].durable == write.sequences[-1]
    assert not flush.answered
    world.pipes["r1"].stalled = False
    world.settle()
    assert flush.error == 0
    assert durable_everywhere(world, write)


@pytest.mark.parametrize("data", [BLOCK, b"part", bytes(2 * PIECE_BYTES_MAX)])
def test_a_write_with_fua_is_durable_everywhere_when_answered(data: bytes) -> None:
    world = World(2, size_bytes=4 << 20)
    for replica in world.replicas.values():
        replica.defers = True
    write = world.write(BLOCK_BYTES, data, fua=True)
    for _ in range(10_000):
        if not world.step():
            break
        if write.answered:
            assert durable_everywhere(world, write)
    assert write.error == 0


@pytest.mark.parametrize("length", [BLOCK_BYTES, 100, 3 * BLOCK_BYTES + 1])
def test_a_zero_with_fua_is_durable_everywhere_when_answered(length: int) -> None:
    world = World(2)
    for replica in world.replicas.values():
        replica.defers = True
    zero = world.zero(BLOCK_BYTES, length, fua=True)
    for _ in range(10_000):
        if not world.step():
            break
        if zero.answered:
            assert durable_everywhere(world, zero)
    assert zero.error == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_flush_covers_every_write_answered_before_it(seed: int) -> None:
    world = World(3, seed=seed)
    for replica in world.replicas.values():
        replica.defers = True
    covered: dict[int, list[Request]] = {}
    for _ in range(300):
        chance = world.random.random()
        if chance < 0.1:
            block = world.random.randrange(60)
            world.write(block * BLOCK_BYTES, world.random.randbytes(BLOCK_BYTES))
        elif chance < 0.15:
            answered = [r for r in world.requests if r.kind == "write" and r.error == 0]
            covered[len(world.requests)] = answered
            world.flush()
        else:
            world.step()
        for index, writes in covered.items():
            if world.requests[index].answered:
                assert all(durable_everywhere(world, write) for write in writes)
    world.settle(chaotic=True)
    world.check_members()


def test_a_member_whose_flush_failed_goes_out_and_the_flush_succeeds_without_it() -> None:
    world = World(3)
    write = world.write(0, BLOCK)
    world.replicas["r1"].flush_fails = True
    flush = world.flush()
    world.settle()
    assert (write.error, flush.error) == (0, 0)
    assert world.state("r1") == OUT
    assert [world.state(uuid) for uuid in ("r0", "r2")] == [IN_SYNC] * 2


def test_a_flush_waits_for_the_record_when_a_member_failed_it() -> None:
    world = World(2)
    world.authority.away = True
    world.replicas["r1"].flush_fails = True
    flush = world.flush()
    world.settle()
    assert not flush.answered
    world.authority.away = False
    world.clock.advance(1)
    world.settle()
    assert flush.error == 0
    assert world.state("r1") == OUT


def test_a_flush_that_fails_on_the_last_member_is_an_error() -> None:
    world = World(2)
    world.lose("r1")
    world.settle()
    world.replicas["r0"].flush_fails = True
    requests = [world.flush(), world.write(0, BLOCK, fua=True)]
    world.settle()
    assert [request.error for request in requests] == [errno.EIO] * 2
    assert world.state("r0") == IN_SYNC


def test_a_flush_that_fails_on_every_member_is_an_error() -> None:
    world = World(3)
    for replica in world.replicas.values():
        replica.flush_fails = True
    flush = world.flush()
    world.settle()
    assert flush.error == errno.EIO
    assert sorted(world.state(uuid) for uuid in world.replicas) == [IN_SYNC, OUT, OUT]


def test_a_flush_goes_on_when_a_member_dies_under_it() -> None:
    world = World(2)
    world.pipes["r1"].stalled = True
    flush = world.flush()
    world.settle()
    world.lose("r1")
    world.settle()
    assert flush.error == 0
    world.check_order()


def test_a_member_being_rebuilt_takes_part_in_flushes() -> None:
    world = World(2)
    world.lose("r1")
    world.settle()
    world.reconnect("r1")
    outcome = world.rebuild("r1")
    world.settle_until(lambda: world.link("r1") in world.engine.targets)
    world.pipes["r1"].stalled = True
    flush = world.flush()
    world.settle()
    assert not flush.answered
    world.pipes["r1"].stalled = False
    world.settle()
    assert flush.error == 0
    assert outcome == [None]


def test_a_flush_that_nobody_is_left_for_fails_whatever_the_failure_of_another_one_does() -> None:
    """A rebuild's flush fails first, its member leaves, and no target is left to wait for."""
    world = World(1)
    world.write(0, BLOCK)
    world.settle()
    world.pipes["r0"].stalled = True
    engine = world.engine
    errors: list[object] = []

    def rebuild_ends(error: object) -> None:
        errors.append(error)
        engine.set_members([], [])

    engine.flush_then(rebuild_ends)
    flush = world.flush()
    engine.flush_then(errors.append)
    world.lose("r0")
    world.settle()
    assert flush.error == errno.EIO
    assert len(errors) == 2
    assert None not in errors
