"""Proves the order: whatever the clients do at the same time, aligned or not, short or long, and in
whatever order bytes travel, all members end with the same content, and it is the content that
the operations have one after the other. Reads see only what a block was while they were under way;
members that die on the way change nothing for the client (rules 2, 3, 8).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication.authority import IN_SYNC
from tests.replication.world import World

BLOCKS = 16
SIZE_BYTES = 1 << 20


def random_operation(world: World, span: int = BLOCKS * BLOCK_BYTES) -> None:
    """One request over the first few blocks, so that most of them overlap."""
    draw = world.random
    aligned = draw.random() < 0.4
    offset = draw.randrange(span)
    length = draw.choice((1, 100, BLOCK_BYTES, draw.randrange(1, 4 * BLOCK_BYTES)))
    if aligned:
        offset -= offset % BLOCK_BYTES
        length = -(-length // BLOCK_BYTES) * BLOCK_BYTES
    length = min(length, span - offset)
    kind = draw.random()
    if kind < 0.5:
        world.write(offset, draw.randbytes(length), fua=draw.random() < 0.1)
    elif kind < 0.7:
        world.zero(offset, length, keep=draw.random() < 0.5, fua=draw.random() < 0.1)
    elif kind < 0.95:
        world.engine.next_turn()
        world.read(offset, length)
    else:
        world.flush()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), members=st.integers(1, 3))
def test_overlapping_operations_end_the_same_everywhere(seed: int, members: int) -> None:
    world = World(members, SIZE_BYTES, seed)
    for replica in world.replicas.values():
        replica.defers = True
    for _ in range(40):
        random_operation(world)
        world.steps(world.random.randrange(12))
    world.settle(chaotic=True)
    assert all(request.error == 0 for request in world.requests)
    world.check_members()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_members_that_die_on_the_way_change_nothing_for_the_client(seed: int) -> None:
    world = World(3, SIZE_BYTES, seed)
    victims = world.random.sample(sorted(world.replicas), world.random.choice((1, 2)))
    moments = {world.random.randrange(40): victim for victim in victims}
    for moment in range(40):
        random_operation(world)
        world.authority.away = world.random.random() < 0.1
        if moment in moments:
            world.lose(moments[moment])
        world.steps(world.random.randrange(12))
        world.clock.advance(0.2)
    world.authority.away = False
    for _ in range(3):
        world.settle(chaotic=True)
        world.clock.advance(2)
    assert all(request.error == 0 for request in world.requests)
    assert sum(world.state(uuid) == IN_SYNC for uuid in world.replicas) == 3 - len(moments)
    world.check_members()


@pytest.mark.parametrize("seed", range(4))
def test_long_operations_mixed_with_short_ones(seed: int) -> None:
    world = World(2, 8 << 20, seed)
    draw = world.random
    for _ in range(6):
        length = draw.randrange(PIECE_BYTES_MAX, 3 * PIECE_BYTES_MAX)
        offset = draw.randrange((8 << 20) - length)
        if draw.random() < 0.5:
            world.write(offset, draw.randbytes(1024) * (length // 1024))
        else:
            world.zero(offset, length)
        random_operation(world)
        world.read(0, 2 * PIECE_BYTES_MAX)
        world.steps(draw.randrange(10))
    world.settle(chaotic=True)
    world.check_members()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (4095, 1), (4095, 2), (1, 4094), (1, 4096), (1, 8191), (4096, 4095), (8000, 9000)],
)
def test_a_partial_write_or_zero_leaves_the_bytes_around_it(offset: int, length: int) -> None:
    world = World(2)
    before = world.random.randbytes(world.size_bytes)
    world.write(0, before)
    world.settle()
    world.write(offset, b"\x33" * length)
    world.settle()
    assert world.replicas["r1"].content()[:offset] == before[:offset]
    assert world.replicas["r1"].content()[offset + length :] == before[offset + length :]
    world.zero(offset, length)
    world.settle()
    expected = before[:offset] + bytes(length) + before[offset + length :]
    assert world.replicas["r0"].content() == expected
    world.check_members()


def test_a_partial_write_reads_what_an_earlier_one_wrote_to_the_same_block() -> None:
    world = World(2)
    for number in range(8):
        world.write(number * 512, bytes([number + 1]) * 512)
    world.settle()
    expected = b"".join(bytes([number + 1]) * 512 for number in range(8))
    assert world.replicas["r0"].block(0) == expected
    world.check_members()


def test_a_whole_block_written_while_a_partial_write_reads_comes_after_it() -> None:
    world = World(2)
    world.write(10, b"part")
    world.write(0, b"\x44" * BLOCK_BYTES)
    world.write(20, b"last")
    world.settle()
    assert world.replicas["r0"].block(0) == b"\x44" * 20 + b"last" + b"\x44" * 4072
    world.check_members()
