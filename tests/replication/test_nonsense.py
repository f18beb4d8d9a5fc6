"""Proves that a replica whose answers make no sense costs at most itself: its session ends,
requests are served by others, changes and rebuilds end, and nothing escapes but WireError.
"""

from __future__ import annotations

import errno
import struct

import pytest

from protocol.units import BLOCK_BYTES, REGION_BYTES
from replication.authority import IN_SYNC
from tests.replication.world import World

BLOCK = b"\x88" * BLOCK_BYTES
NO_OBJECTS = [b"{", b"[]"]
BAD_OBJECTS = [b"{}", b'{"layers":3,"head_id":"x","regions":[[]]}']


def replicated(members: int) -> World:
    world = World(members, 2 * REGION_BYTES)
    world.write(0, BLOCK)
    world.settle()
    return world


@pytest.mark.parametrize(
    "payload",
    [pytest.param(b"12"), pytest.param(b"\x01\0\0\0" * 3), b"x" * 8192],
    ids=["short", "long", "wrong"],
)
def test_a_read_answered_with_nonsense_is_served_by_another_member(payload: bytes) -> None:
    world = replicated(2)
    world.replicas["r0"].nonsense["read"] = payload[:9000]
    reads = []
    for _ in range(4):
        world.engine.next_turn()
        reads.append(world.read(0, 2 * BLOCK_BYTES))
        reads.append(world.read(0, 1))
    partial = world.write(5, b"edge")
    world.settle()
    for read in reads:
        assert read.result is not None, "a read was never answered"
        assert read.result[:1] == b"\x88"
    assert partial.error == 0
    world.check_members()


def test_a_read_the_last_member_answers_with_nonsense_fails() -> None:
    world = replicated(1)
    world.replicas["r0"].nonsense["read"] = b"12"
    requests = [world.read(0, BLOCK_BYTES), world.write(5, b"edge")]
    world.settle()
    assert [request.error for request in requests] == [errno.EIO] * 2
    assert not world.engine.locks.held


@pytest.mark.parametrize(
    "payload",
    [b"1", b"1234", struct.pack("<II", 99, 1), struct.pack("<II", 0, 1), b"x" * 12],
    ids=repr,
)
def test_extents_answered_with_nonsense_are_asked_of_another_member(payload: bytes) -> None:
    world = replicated(2)
    world.replicas["r0"].nonsense["extents"] = payload
    asked = []
    for _ in range(2):
        world.engine.next_turn()
        asked.append(world.ask_extents(0, 2 * BLOCK_BYTES))
    world.settle()
    assert [request.result for request in asked] == [[(1, True), (1, False)]] * 2


@pytest.mark.parametrize(
    "payload", [*NO_OBJECTS, *(pytest.param(bad) for bad in BAD_OBJECTS)], ids=repr
)
def test_a_snapshot_after_nonsense_about_the_tree_is_made(payload: bytes) -> None:
    world = replicated(2)
    for name in ("a", "b"):
        world.snapshot(name)
    world.settle()
    world.structure.remove("a", lambda error: None)
    world.settle()
    world.replicas["r0"].nonsense["tree"] = payload
    world.structure.forget_folded()
    outcome = world.snapshot("c")
    world.settle()
    assert outcome == [None]
    assert not world.engine.changes.busy


@pytest.mark.parametrize(
    "payload", [*NO_OBJECTS, *(pytest.param(bad) for bad in BAD_OBJECTS)], ids=repr
)
@pytest.mark.parametrize("word", ["tree", "layer_regions"])
def test_a_rebuild_goes_on_from_another_source_after_nonsense(word: str, payload: bytes) -> None:
    world = replicated(3)
    world.lose("r2")
    world.settle()
    world.reconnect("r2")
    world.replicas["r0"].nonsense[word] = payload
    outcome = world.rebuild("r2")
    world.settle()
    assert outcome == [None]
    assert world.state("r2") == IN_SYNC
    world.check_members()


@pytest.mark.parametrize(
    "payload",
    [
        *(pytest.param(bad) for bad in NO_OBJECTS),
        *(pytest.param(bad) for bad in BAD_OBJECTS),
    ],
    ids=repr,
)
def test_a_last_member_that_returns_with_nonsense_is_not_taken_in(payload: bytes) -> None:
    world = replicated(1)
    world.lose("r0")
    world.replicas["r0"].nonsense["tree"] = payload
    world.reconnect("r0")
    world.settle()
    assert world.engine.readers == []
    assert not world.engine.changes.busy
    world.replicas["r0"].nonsense.clear()
    world.reconnect("r0")
    read = world.read(0, BLOCK_BYTES)
    world.settle()
    assert read.result == BLOCK
