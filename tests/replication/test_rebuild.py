"""Proves that a rebuilt member is byte-identical in every layer before it is read or counted on,
whatever is written, snapshotted, lost or refused meanwhile.
"""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import ConflictError, StateError, StorageError
from protocol.units import BLOCK_BYTES, REGION_BYTES
from replication.authority import IN_SYNC, OUT, SYNCING
from replication.copyjobs import WINDOW
from tests.replication.world import VOLUME, World

BLOCK = b"\x66" * BLOCK_BYTES
REGIONS = 4
SIZE_BYTES = REGIONS * REGION_BYTES


def degraded(members: int = 2, seed: int = 0, layers: int = 2) -> World:
    """A world with `layers` snapshots and data in every region, whose last member is OUT, stale,
    and connected again."""
    world = World(members, SIZE_BYTES, seed)
    out = f"r{members - 1}"
    for number in range(layers + 1):
        for region in range(REGIONS):
            block = world.random.randrange(6)
            offset = region * REGION_BYTES + block * BLOCK_BYTES
            world.write(offset, world.random.randbytes(BLOCK_BYTES))
        if number < layers:
            world.snapshot(f"s{number}")
        world.settle()
        if number == 0:
            world.lose(out)
            world.settle()
    assert world.state(out) == OUT
    assert world.reconnect(out)
    return world


def random_change(world: World) -> None:
    draw = world.random
    offset = draw.randrange(REGIONS) * REGION_BYTES + draw.randrange(6 * BLOCK_BYTES)
    if draw.random() < 0.7:
        world.write(offset, draw.randbytes(draw.choice((100, 3000, BLOCK_BYTES))))
    else:
        world.zero(offset, draw.choice((100, 4 * BLOCK_BYTES, REGION_BYTES // 2)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_a_rebuilt_member_is_identical_in_every_layer(seed: int) -> None:
    world = degraded(members=world_size(seed), seed=seed)
    out = f"r{len(world.replicas) - 1}"
    outcome = world.rebuild(out)
    world.settle_until(lambda: world.state(out) == SYNCING)
    number = 0
    while not outcome:
        random_change(world)
        number += 1
        if world.random.random() < 0.05 and world.link(out) in world.engine.targets:
            world.snapshot(f"during{number}")
        if world.random.random() < 0.3:
            world.read(world.random.randrange(SIZE_BYTES - 9000), 9000)
        world.steps(world.random.randrange(1, 30))
        if not world.step():
            world.settle()
    world.settle(chaotic=True)
    assert outcome == [None]
    assert world.state(out) == IN_SYNC
    assert all(request.error == 0 for request in world.requests)
    world.check_members()
    assert set(world.replicas[out].layers) == set(world.replicas["r0"].layers)


def world_size(seed: int) -> int:
    return 2 + seed % 2


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_the_copy_goes_on_from_another_member_when_the_source_dies(seed: int) -> None:
    world = degraded(members=3, seed=seed)
    outcome = world.rebuild("r2")
    moment = world.random.randrange(60)
    for number in range(2000):
        if outcome:
            break
        if number == moment:
            world.lose("r0")
        if number < 100 and number % 5 == 0:
            random_change(world)
        world.steps(world.random.randrange(1, 8))
    world.settle(chaotic=True)
    assert outcome == [None]
    assert world.state("r2") == IN_SYNC
    assert world.state("r0") == (IN_SYNC if world.link("r0").connected else OUT)
    assert all(request.error == 0 for request in world.requests)
    world.check_members()


@pytest.mark.parametrize("seed", range(15))
def test_a_target_that_dies_is_out_and_requests_go_on(seed: int) -> None:
    world = degraded(seed=seed)
    outcome = world.rebuild("r1")
    for number in range(world.random.randrange(80)):
        if number % 5 == 0:
            random_change(world)
        world.step()
    world.lose("r1")
    random_change(world)
    world.settle(chaotic=True)
    if outcome != [None]:
        assert isinstance(outcome[0], BaseException)
    assert world.state("r1") == OUT
    assert all(request.error == 0 for request in world.requests)
    world.check_members()
    assert not world.engine.rebuilds
    assert world.reconnect("r1")
    again = world.rebuild("r1")
    world.settle()
    assert again == [None]
    world.check_members()


def test_a_target_lost_before_its_barrier_can_be_rebuilt_when_it_is_back() -> None:
    world = degraded()
    world.rebuild("r1")
    world.pipes["r0"].muted = True  # the tree of the source does not come
    world.settle()
    assert world.engine.record.members["r1"].state == SYNCING
    assert world.link("r1") not in world.engine.targets
    world.lose("r1")
    world.reconnect("r1")
    world.pipes["r0"].muted = False
    world.settle()
    world.reconnect("r1")
    world.settle()
    assert world.state("r1") == OUT
    outcome = world.rebuild("r1")
    world.settle()
    assert outcome == [None]


def test_a_member_being_rebuilt_is_not_read() -> None:
    world = degraded()
    world.rebuild("r1")
    world.settle_until(lambda: world.link("r1") in world.engine.targets)
    world.pipes["r1"].stalled = True
    before = world.replicas["r1"].reads
    for _ in range(6):
        world.engine.next_turn()
        world.read(0, BLOCK_BYTES)
    world.settle()
    assert all(request.error == 0 for request in world.requests)
    assert world.replicas["r1"].reads == before
    world.pipes["r1"].stalled = False
    world.settle()
    world.check_members()


def test_a_member_being_rebuilt_holds_answers_like_any_other() -> None:
    world = degraded()
    world.rebuild("r1")
    world.settle_until(lambda: world.link("r1") in world.engine.targets)
    world.pipes["r1"].stalled = True
    write = world.write(3 * REGION_BYTES, BLOCK)
    world.settle()
    assert not write.answered
    world.lose("r1")
    world.settle()
    assert write.error == 0


def test_promotion_waits_for_the_end_of_the_copy_a_flush_and_the_record() -> None:
    world = degraded()
    outcome = world.rebuild("r1")
    target = world.replicas["r1"]
    target.defers = True
    world.settle_until(lambda: target.complete)
    writes = [request for request in world.requests if request.kind == "write"]
    while world.state("r1") != IN_SYNC:
        assert world.link("r1") not in world.engine.readers
        due = world._due()
        due[0](1 << 30)
    assert target.durable >= max(
        s for request in writes for s in request.sequences if s in target.order
    )
    world.settle()
    assert outcome == [None]
    assert world.link("r1") in world.engine.readers


def test_promotion_is_held_while_the_authority_is_away() -> None:
    world = degraded()
    outcome = world.rebuild("r1")
    world.settle_until(lambda: world.replicas["r1"].complete)
    world.authority.away = True
    world.settle()
    assert outcome == []
    assert world.link("r1") not in world.engine.readers
    world.authority.away = False
    world.clock.advance(1)
    world.settle()
    assert outcome == [None]
    world.check_members()


def test_a_target_whose_flush_fails_is_not_promoted() -> None:
    world = degraded()
    outcome = world.rebuild("r1")
    world.settle_until(lambda: world.replicas["r1"].complete)
    world.replicas["r1"].flush_fails = True
    world.settle()
    assert isinstance(outcome[0], BaseException)
    assert world.state("r1") == OUT
    world.check_members()


def test_a_rebuild_without_a_source_left_ends_and_the_target_is_out() -> None:
    world = degraded()
    outcome = world.rebuild("r1")
    world.settle_until(lambda: bool(world.engine.locks.held))
    world.lose("r0")
    world.settle()
    assert len(outcome) == 1
    assert outcome[0] is not None
    assert (world.state("r0"), world.state("r1")) == (IN_SYNC, OUT)
    assert world.reconnect("r0")
    write = world.write(0, BLOCK)
    world.settle()
    assert write.error == 0
    assert not world.engine.locks.held


@pytest.mark.parametrize(
    "what", ["begin_sync", "end_sync", "layer_write"], ids=["begin", "end", "a region"]
)
def test_a_target_that_refuses_a_step_is_out(what: str) -> None:
    world = degraded()
    target = world.replicas["r1"]
    if what == "layer_write":
        target._layer_write = refuse  # type: ignore[method-assign]
    else:
        target.refuse_control[what] = StorageError("no", errno=errno.ENOSPC)
    outcome = world.rebuild("r1")
    world.settle()
    write = world.write(0, BLOCK)
    world.settle()
    assert isinstance(outcome[0], StorageError)
    assert world.state("r1") == OUT
    assert write.error == 0
    world.check_members()


def refuse(*arguments: object) -> None:
    raise StorageError("no", errno=errno.ENOSPC)


def test_a_region_one_source_cannot_read_is_read_from_another() -> None:
    world = degraded(members=3)
    world.replicas["r0"].refuse_layer_read = {(1, 2), (3, 1)}
    outcome = world.rebuild("r2")
    world.settle()
    assert outcome == [None]
    world.check_members()


@pytest.mark.parametrize(
    "members",
    [
        2,
        pytest.param(
            3,
        ),
    ],
)
def test_a_region_no_source_can_read_ends_the_rebuild(members: int) -> None:
    world = degraded(members=members)
    for replica in world.replicas.values():
        replica.refuse_layer_read = {(3, 1)}
    out = f"r{members - 1}"
    outcome = world.rebuild(out)
    world.settle()
    assert isinstance(outcome[0], BaseException)
    assert world.state(out) == OUT
    write = world.write(REGION_BYTES, BLOCK)
    world.settle()
    assert write.error == 0


def test_a_write_to_a_region_waits_while_it_is_copied_and_others_do_not() -> None:
    world = degraded(layers=0)
    world.rebuild("r1")
    world.settle_until(lambda: len(world.engine.locks.held) == WINDOW)
    (first, _), *_ = world.engine.locks.held
    world.pipes["r1"].stalled = True
    inside = world.write(first * BLOCK_BYTES, BLOCK)
    before = world.engine.sequence
    world.write((REGIONS - 1) * REGION_BYTES, BLOCK)
    assert world.engine.sequence == before + 1
    assert not inside.sequences
    world.pipes["r1"].stalled = False
    world.settle()
    assert inside.error == 0
    world.check_members()


@pytest.mark.parametrize("state", ["in sync", "not connected", "no source"])
def test_a_rebuild_that_cannot_start_says_why(state: str) -> None:
    world = degraded(members=3)
    if state == "in sync":
        with pytest.raises(ConflictError):
            world.rebuild("r0")
        return
    if state == "not connected":
        world.lose("r2")
    else:
        world.lose("r0")
        world.lose("r1")
    with pytest.raises(StateError):
        world.rebuild("r2")
    assert world.link("r2").state == OUT


def test_folding_is_paused_on_the_sources_until_the_rebuild_ends() -> None:
    world = degraded(members=3)
    world.rebuild("r2")
    world.settle_until(
        lambda: world.replicas["r2"].head_id == 3 and not world.replicas["r2"].complete
    )
    world.settle_until(lambda: bool(world.engine.locks.held) or world.state("r2") == IN_SYNC)
    assert world.replicas["r0"].paused
    assert world.replicas["r1"].paused
    world.settle()
    assert not world.replicas["r0"].paused
    assert not world.replicas["r1"].paused


def test_a_rebuild_works_after_a_deleted_snapshot_was_folded() -> None:
    world = degraded()
    world.structure.remove("s1", lambda error: None)
    world.settle()
    world.replicas["r0"].fold(2)
    outcome = world.rebuild("r1")
    world.settle()
    assert outcome == [None]
    world.check_members()


def test_sources_that_have_folded_differently_still_give_a_whole_copy() -> None:
    world = World(3, SIZE_BYTES)
    world.lose("r2")
    world.settle()
    for region in range(REGIONS):
        world.write(region * REGION_BYTES, BLOCK)
    world.snapshot("s0")
    world.settle()
    world.write(0, b"\x67" * BLOCK_BYTES)
    world.snapshot("s1")
    world.settle()
    world.structure.remove("s0", lambda error: None)
    world.settle()
    half = world.replicas["r1"]  # its folding is nearly done: the layer is empty but there
    half.layers[2].blocks = {**half.layers[1].blocks, **half.layers[2].blocks}
    half.layers[1].blocks = {}
    world.reconnect("r2")
    outcome = world.rebuild("r2")
    world.settle_until(lambda: world.replicas["r2"].copied > 0)
    world.lose("r0")
    world.settle()
    if outcome == [None]:
        assert world.replicas["r2"].content() == world.replicas["r1"].content()


def test_a_snapshot_that_overlaps_the_start_of_a_rebuild_leaves_the_members_equal() -> None:
    world = degraded(layers=0)
    world.pipes["r0"].stalled = True
    world.rebuild("r1")
    world.snapshot("overlapping")
    world.settle()
    world.pipes["r0"].stalled = False
    world.settle_until(lambda: world.authority.records[VOLUME].head_id == 2)
    world.write(REGION_BYTES, BLOCK)
    world.settle()
    if world.state("r1") == IN_SYNC:
        world.check_members()


def test_a_rebuild_of_a_member_that_is_being_removed_ends_with_an_error() -> None:
    world = degraded()

    def without(record: object) -> object:
        from dataclasses import replace

        members = {uuid: m for uuid, m in record.members.items() if uuid != "r1"}  # type: ignore[attr-defined]
        return replace(record, members=members)  # type: ignore[type-var]

    world.ledger.change(without, lambda error: None)  # type: ignore[arg-type]
    outcome = world.rebuild("r1")
    world.settle()
    assert isinstance(outcome[0], BaseException)


def test_a_source_that_answers_nonsense_does_not_leave_the_rebuild_hanging() -> None:
    world = degraded(members=3)
    source = world.replicas["r0"]
    control = source._control

    def nonsense(content: dict[str, object]) -> dict[str, object]:
        if content["do"] == "layer_regions":
            return {"regions": [[1, 2]], "next": None, "x": float("nan")}
        return control(content)

    source._control = nonsense  # type: ignore[method-assign,assignment]
    from protocol import replica as wire

    original = wire.json_content
    calls = []

    def broken(payload: memoryview | None) -> dict[str, object]:
        content = original(payload)
        if "x" in content and not calls:
            calls.append(1)
            raise wire.WireError("not JSON")
        return content

    wire.json_content = broken  # type: ignore[assignment]
    try:
        outcome = world.rebuild("r2")
        world.settle()
    finally:
        wire.json_content = original
    assert outcome
    assert not world.engine.rebuilds


# ---- what changed while it was away -------------------------------------------------------------


def away(seed: int = 0, members: int = 2) -> World:
    """A world whose members were equal; then the last one was lost."""
    world = World(members, 6 * REGION_BYTES, seed)
    for region in range(6):
        world.write(region * REGION_BYTES, world.random.randbytes(4 * BLOCK_BYTES))
    world.flush()
    world.settle()
    world.lose(f"r{members - 1}")
    world.settle()
    return world


def rebuilt(world: World, uuid: str = "r1") -> int:
    """Rebuild a member; how many blocks were copied to it."""
    assert world.reconnect(uuid)
    before = world.replicas[uuid].copied
    outcome = world.rebuild(uuid)
    world.settle()
    assert outcome == [None]
    world.check_members()
    return world.replicas[uuid].copied - before


def test_a_member_that_missed_nothing_gets_nothing() -> None:
    world = away()
    assert rebuilt(world) == 0


def test_a_member_gets_what_changed_while_it_was_away_and_nothing_else() -> None:
    world = away()
    world.write(2 * REGION_BYTES + BLOCK_BYTES, world.random.randbytes(BLOCK_BYTES))
    world.zero(5 * REGION_BYTES, 2 * BLOCK_BYTES)
    world.settle()
    assert rebuilt(world) == 3


@pytest.mark.parametrize("flushes", [0, 1, 3])
def test_what_changed_is_known_after_it_became_stable_on_the_others(flushes: int) -> None:
    world = away(members=3)
    world.write(0, world.random.randbytes(BLOCK_BYTES))
    world.settle()
    for _ in range(flushes):
        world.flush()
        world.settle()
    assert (world.replicas["r0"].dirty == {}) is (flushes > 0)
    assert rebuilt(world, "r2") == 1


def test_changes_only_the_lost_member_has_are_undone() -> None:
    world = away()
    lost = world.replicas["r1"]
    lost.layers[1].blocks[3 * 1024] = b"\x01" * BLOCK_BYTES
    lost.touch([3 * 1024])
    assert rebuilt(world) == 1


def test_a_member_lost_twice_gets_what_changed_since_the_first_time() -> None:
    world = away()
    world.write(0, world.random.randbytes(BLOCK_BYTES))
    world.flush()
    world.settle()
    assert world.reconnect("r1")
    world.rebuild("r1")
    world.settle_until(lambda: world.link("r1") in world.engine.targets)
    world.lose("r1")
    world.write(REGION_BYTES, world.random.randbytes(BLOCK_BYTES))
    world.flush()
    world.settle()
    assert rebuilt(world) == 2


def test_a_member_rebuilt_from_another_knows_what_a_third_one_missed() -> None:
    world = away(members=3)  # r2 is away
    world.lose("r1")
    world.settle()
    world.write(0, world.random.randbytes(BLOCK_BYTES))
    world.zero(4 * REGION_BYTES, BLOCK_BYTES)
    world.flush()
    world.settle()
    rebuilt(world, "r1")
    world.lose("r0")
    world.settle()
    assert rebuilt(world, "r2") == 2  # from r1, which was away itself


def test_a_member_that_holds_another_tree_is_filled_anew() -> None:
    world = degraded(layers=2)
    target = world.replicas["r1"]
    target._do_seal({"new_head_id": 3, "name": "strange"})
    target.layers[3].parent = 0
    outcome = world.rebuild("r1")
    world.settle()
    assert outcome == [None]
    assert target.controls[-1] != []
    assert [c["fresh"] for c in target.controls if c["do"] == "begin_sync"][-1]
    world.check_members()


def test_members_that_differ_after_the_copy_are_not_promoted() -> None:
    world = away()
    target = world.replicas["r1"]
    world.write(0, world.random.randbytes(BLOCK_BYTES))
    world.settle()
    assert world.reconnect("r1")
    target._layer_write = lambda *arguments: None  # type: ignore[method-assign]
    outcome = world.rebuild("r1")
    world.settle()
    assert isinstance(outcome[0], StateError)
    assert world.state("r1") == OUT
    assert not target.complete


def test_two_members_are_rebuilt_at_the_same_time() -> None:
    world = away(members=4)
    world.lose("r2")
    world.settle()
    for region in range(6):
        world.write(region * REGION_BYTES, world.random.randbytes(BLOCK_BYTES))
    world.settle()
    outcomes = []
    for uuid in ("r2", "r3"):
        assert world.reconnect(uuid)
        outcomes.append(world.rebuild(uuid))
    world.settle_until(lambda: len(world.engine.rebuilds) == 2)
    for _ in range(30):
        random_change(world)
        world.steps(10)
    world.settle(chaotic=True)
    assert outcomes == [[None], [None]]
    assert not world.replicas["r0"].paused
    world.check_members()


def test_sources_take_turns() -> None:
    world = degraded(members=3)
    read: dict[str, int] = {}
    for uuid in ("r0", "r1"):
        copying = world.replicas[uuid].copying

        def counted(frame, uuid=uuid, copying=copying):  # type: ignore[no-untyped-def]
            read[uuid] = read.get(uuid, 0) + 1
            return copying(frame)

        world.replicas[uuid].copying = counted  # type: ignore[method-assign]
    world.rebuild("r2")
    world.settle()
    assert min(read.values()) > max(read.values()) // 3


def test_members_hear_of_every_configuration_before_a_write_is_answered() -> None:
    world = World(3, SIZE_BYTES)
    world.pipes["r2"].stalled = True
    write = world.write(0, BLOCK)
    world.settle()
    world.lose("r2")
    for uuid in ("r0", "r1"):
        world.pipes[uuid].muted = True
    world.settle()
    assert world.state("r2") == OUT
    assert not write.answered  # they have not said that they know
    for uuid in ("r0", "r1"):
        world.pipes[uuid].muted = False
    world.settle()
    assert write.error == 0
    seq = world.authority.records[VOLUME].config_seq
    assert [world.replicas[uuid].config_seq for uuid in ("r0", "r1")] == [seq, seq]
