"""Proves that the last changes of a dead owner are the same on all members before anybody reads
from those that lacked them, whatever is lost on the way."""

from __future__ import annotations

import pytest

from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication.authority import OUT
from replication.catchup import PIECE_BLOCKS, WINDOW, CatchUp
from tests.replication.test_room import fill
from tests.replication.world import World

Ranges = list[tuple[int, int]]


def differing(seed: int = 0, size_bytes: int = 64 * BLOCK_BYTES) -> tuple[World, Ranges]:
    """A new owner of three members, of which r1 and r2 lack what r0 has in some ranges."""
    world = World(3, seed=seed, size_bytes=size_bytes)
    ranges = [(3, 2), (4, 3), (20, 1), (40, 4)]
    for uuid, replica in world.replicas.items():
        blocks = replica.layers[1].blocks
        for first, count in ranges:
            for number in range(first, first + count):
                blocks[number] = bytes([number + 1]) * BLOCK_BYTES if uuid == "r0" else None
        if uuid == "r0":
            blocks[41] = None  # a trim is among them
            del blocks[42]
    content = world.replicas["r0"].content()
    world.model[:] = content
    for number in range(len(content) // BLOCK_BYTES):
        start = number * BLOCK_BYTES
        world.versions[number] = [(0, content[start : start + BLOCK_BYTES])]
    return world, ranges


def catch_up(world: World, ranges: Ranges) -> list[BlockdError | None]:
    outcome: list[BlockdError | None] = []
    behind = [world.link("r1"), world.link("r2")]
    CatchUp(world.engine, ranges, behind, outcome.append).start()
    return outcome


def all_equal(world: World, *uuids: str) -> bool:
    return len({world.replicas[uuid].content() for uuid in uuids}) == 1


@pytest.mark.parametrize("seed", range(10))
def test_members_that_were_behind_are_equal_and_only_then_read(seed: int) -> None:
    world, ranges = differing(seed)
    outcome = catch_up(world, ranges)
    while not outcome:
        assert world.engine.readers == [world.link("r0")]
        world.step()
    assert outcome == [None]
    assert len(world.engine.readers) == 3
    world.settle(chaotic=True)
    assert all_equal(world, "r0", "r1", "r2")
    assert world.replicas["r1"].block(41) is None


def test_nothing_to_repeat_ends_at_once() -> None:
    world, _ = differing()
    assert catch_up(world, []) == [None]
    assert len(world.engine.readers) == 3


def test_long_ranges_are_repeated_in_pieces_a_few_at_a_time() -> None:
    world, _ = differing(size_bytes=(WINDOW + 20) * PIECE_BYTES_MAX)
    outcome = catch_up(world, [(0, (WINDOW + 20) * PIECE_BLOCKS)])
    world.settle()
    assert outcome == [None]
    assert all_equal(world, "r0", "r1", "r2")


def test_a_member_lost_meanwhile_does_not_come_back_as_equal() -> None:
    world, ranges = differing()
    outcome = catch_up(world, ranges)
    world.steps(3)
    world.lose("r1")
    world.settle()
    assert outcome == [None]
    assert world.link("r1") not in world.engine.readers
    assert all_equal(world, "r0", "r2")


def test_a_member_without_space_for_what_it_lacks_does_not_hold_the_opening_up() -> None:
    world, ranges = differing()
    fill(world, "r1")
    outcome = catch_up(world, ranges)
    world.settle()
    assert outcome == [None]
    assert not world.engine.paused
    assert world.state("r1") == OUT
    assert all_equal(world, "r0", "r2")


def test_without_the_source_nothing_is_served() -> None:
    """A member that is behind must not become the truth only because the source was lost."""
    world, ranges = differing()
    for replica in world.replicas.values():
        replica.defers = True
    outcome = catch_up(world, ranges)
    world.lose("r0")
    world.settle()
    assert len(outcome) == 1
    assert outcome[0] is not None
