"""Proves snapshots, deletion and revert: the same point of the order on every member, or it did not
happen; and what remains when members refuse or die half way (rule 9).
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import replica as wire
from protocol.errors import (
    BlockdError,
    ConflictError,
    NotFoundError,
    RequestError,
    StateError,
    StorageError,
)
from protocol.units import BLOCK_BYTES, SNAPSHOTS_MAX
from replication.authority import IN_SYNC, OUT, LayerRecord, Record
from replication.structure import (
    LABEL_CHARACTERS_MAX,
    LABELS_MAX,
    check_labels,
    drop_layers,
)
from tests.replication.world import VOLUME, World

BLOCK = b"\x42" * BLOCK_BYTES


def removed(world: World, name: str) -> list[BlockdError | None]:
    outcome: list[BlockdError | None] = []
    world.structure.remove(name, outcome.append)
    return outcome


def reverted(world: World, name: str) -> list[BlockdError | None]:
    outcome: list[BlockdError | None] = []
    world.structure.revert(name, outcome.append)
    return outcome


def record_of(world: World) -> Record:
    return world.authority.records[VOLUME]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_a_snapshot_is_the_same_point_on_every_member(seed: int) -> None:
    world = World(3, seed=seed)
    draw = world.random
    expected: dict[str, bytes] = {}
    for number in range(30):
        offset = draw.randrange(8 * BLOCK_BYTES)
        world.write(offset, draw.randbytes(draw.choice((100, BLOCK_BYTES, 9000))))
        if draw.random() < 0.2 and not world.structure.busy:
            expected[f"s{number}"] = bytes(world.model)
            world.snapshot(f"s{number}")
        world.steps(draw.randrange(20))
    world.settle(chaotic=True)
    assert [layer.name for layer in record_of(world).layers] == list(expected)
    for layer in record_of(world).layers:
        for replica in world.replicas.values():
            assert replica.content(layer.id) == expected[layer.name]
    assert all(request.error == 0 for request in world.requests)
    world.check_members()


def test_a_snapshot_is_durable_and_recorded_when_answered() -> None:
    world = World(2)
    world.write(0, BLOCK)
    world.settle()
    for replica in world.replicas.values():
        replica.defers = True
    outcome = world.snapshot("one")
    for _ in range(1000):
        if outcome or not world.step():
            break
    assert outcome == [None]
    assert record_of(world).head_id == 2
    assert record_of(world).layers[0].name == "one"
    for replica in world.replicas.values():
        assert replica.durable >= 1
        assert replica.layers[1].name == "one"


def test_a_snapshot_waits_for_the_authority_while_requests_go_on() -> None:
    world = World(2)
    world.authority.away = True
    outcome = world.snapshot("one")
    world.settle()
    write = world.write(0, BLOCK)
    world.settle()
    assert outcome == []
    assert write.error == 0
    world.authority.away = False
    world.clock.advance(1)
    world.settle()
    assert outcome == [None]
    assert all(replica.content(1) == bytes(world.size_bytes) for replica in world.replicas.values())


def test_a_snapshot_is_recorded_once_when_the_authority_lost_the_answer() -> None:
    world = World(2)
    world.authority.lose_answers = 1
    outcome = world.snapshot("one")
    world.settle()
    world.clock.advance(1)
    world.settle()
    assert outcome == [None]
    assert [layer.id for layer in record_of(world).layers] == [1]


def test_a_second_snapshot_of_a_name_is_refused() -> None:
    world = World(2)
    outcomes = [world.snapshot("one"), world.snapshot("one"), world.snapshot("two")]
    world.settle()
    assert outcomes[0] == outcomes[2] == [None]
    assert isinstance(outcomes[1][0], ConflictError)
    assert [layer.name for layer in record_of(world).layers] == ["one", "two"]


def test_snapshot_255_is_refused_with_the_limit_in_the_message() -> None:
    world = World(1, size_bytes=BLOCK_BYTES)
    for number in range(SNAPSHOTS_MAX):
        outcome = world.snapshot(f"s{number}")
        world.settle()
        assert outcome == [None]
    outcome = world.snapshot("one-too-many")
    world.settle()
    assert isinstance(outcome[0], StateError)
    assert "254" in str(outcome[0])
    assert len(record_of(world).layers) == SNAPSHOTS_MAX


def test_deleted_snapshots_stop_counting_when_they_are_folded() -> None:
    world = World(1, size_bytes=BLOCK_BYTES)
    for number in range(SNAPSHOTS_MAX + 1):
        outcome = world.snapshot(f"s{number}")
        world.settle()
        assert outcome == [None]
        removed(world, f"s{number}")
        world.settle()
        world.replicas["r0"].fold(number + 1)
        world.settle()


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "-a", "a-", "a@b", "a/b", "x" * 64])
def test_a_name_that_cannot_be_exported_is_refused_at_once(name: str) -> None:
    with pytest.raises(RequestError):
        World(1).structure.create(name, {}, lambda error: None)


def test_a_snapshot_without_any_member_is_refused() -> None:
    world = World(1)
    world.lose("r0")
    outcome = world.snapshot("one")
    world.settle()
    assert isinstance(outcome[0], StateError)
    assert record_of(world).layers == ()


def test_a_snapshot_everybody_refuses_did_not_happen() -> None:
    world = World(2)
    for replica in world.replicas.values():
        replica.refuse_control["seal"] = StorageError("disk full", errno=errno.ENOSPC)
    outcome = world.snapshot("one")
    world.settle()
    assert isinstance(outcome[0], StorageError)
    assert record_of(world).layers == ()
    assert [world.state(uuid) for uuid in world.replicas] == [IN_SYNC, IN_SYNC]
    for replica in world.replicas.values():
        replica.refuse_control.clear()
    again = world.snapshot("one")
    world.settle()
    assert again == [None]


def test_a_member_that_alone_refuses_a_snapshot_goes_out() -> None:
    world = World(3)
    world.replicas["r1"].refuse_control["seal"] = StorageError("disk full", errno=errno.ENOSPC)
    outcome = world.snapshot("one")
    world.settle()
    assert outcome == [None]
    assert world.state("r1") == OUT
    world.check_members()


def test_a_member_that_dies_during_a_snapshot_goes_out_before_the_answer() -> None:
    world = World(2)
    world.pipes["r1"].stalled = True
    outcome = world.snapshot("one")
    world.settle()
    assert outcome == []
    world.lose("r1")
    world.settle()
    assert outcome == [None]
    assert world.state("r1") == OUT
    assert record_of(world).head_id == world.replicas["r0"].head_id


def rebuilding(world: World) -> None:
    """r1 is being rebuilt, and its copy is not finished."""
    world.write(0, BLOCK)
    world.settle()
    world.lose("r1")
    world.settle()
    world.reconnect("r1")
    world.rebuild("r1")
    world.settle_until(lambda: world.link("r1") in world.engine.targets)


def test_a_snapshot_refused_by_all_in_sync_does_not_cost_the_volume_during_a_rebuild() -> None:
    world = World(2)
    rebuilding(world)
    world.replicas["r0"].refuse_control["seal"] = StorageError("full", errno=errno.ENOSPC)
    outcome = world.snapshot("one")
    world.settle()
    write = world.write(0, BLOCK)
    world.settle()
    assert isinstance(outcome[0], StorageError)
    assert write.error == 0


def test_a_refused_snapshot_ends_once_when_a_member_being_rebuilt_made_it() -> None:
    world = World(2)
    rebuilding(world)
    world.replicas["r0"].refuse_control["seal"] = StorageError("full", errno=errno.ENOSPC)
    world.pipes["r1"].muted = True
    outcome = world.snapshot("one")
    waiting = world.snapshot("two")
    world.settle()
    world.pipes["r1"].muted = False
    world.settle()
    assert len(outcome) == len(waiting) == 1
    assert isinstance(outcome[0], StorageError)
    assert (world.state("r0"), world.state("r1")) == (IN_SYNC, OUT)
    assert not world.engine.changes.busy


def test_after_a_snapshot_lost_with_the_last_member_a_rebuild_still_copies_everything() -> None:
    world = World(2)
    world.lose("r1")
    world.settle()
    world.pipes["r0"].muted = True
    outcome = world.snapshot("one")
    world.settle()
    assert world.replicas["r0"].head_id == 2
    world.lose("r0")
    assert outcome[0] is not None
    world.settle()
    world.reconnect("r0")
    write = world.write(0, BLOCK)
    world.settle()
    assert write.error == 0
    world.reconnect("r1")
    world.rebuild("r1")
    world.settle()
    if world.state("r1") == IN_SYNC:
        assert world.replicas["r1"].content() == world.replicas["r0"].content()


def test_after_a_snapshot_lost_with_the_last_member_the_next_one_works() -> None:
    world = World(1)
    world.pipes["r0"].muted = True
    world.snapshot("one")
    world.settle()
    world.lose("r0")
    world.reconnect("r0")
    again = world.snapshot("two")
    world.settle()
    assert again == [None]


def test_a_snapshot_asked_for_by_the_answer_of_another_is_made_once() -> None:
    world = World(1)
    outcome: list[BlockdError | None] = []
    world.structure.create(
        "one", {}, lambda error: world.structure.create("two", {}, outcome.append)
    )
    world.settle()
    assert [layer.name for layer in record_of(world).layers] == ["one", "two"]
    assert outcome == [None]
    assert not world.structure.busy


# ---- delete -----------------------------------------------------------------------------------


def test_a_deleted_snapshot_is_gone_and_the_others_read_as_before() -> None:
    world = World(2)
    contents = []
    for number in range(3):
        world.write(number * BLOCK_BYTES, BLOCK)
        world.settle()
        contents.append(bytes(world.model))
        world.snapshot(f"s{number}")
        world.settle()
    assert removed(world, "s1") == []
    world.settle()
    assert record_of(world).layer_named("s1") is None
    for replica in world.replicas.values():
        replica.fold(2)
        assert [replica.content(1), replica.content(3)] == [contents[0], contents[2]]
    world.check_members()


def test_deleting_what_does_not_exist_says_so() -> None:
    world = World(1)
    outcomes = [removed(world, "nothing"), removed(world, ""), reverted(world, "nothing")]
    world.settle()
    assert all(isinstance(outcome[0], NotFoundError) for outcome in outcomes)


def test_a_deleted_name_can_be_used_again() -> None:
    world = World(2)
    outcomes = [world.snapshot("one"), removed(world, "one"), world.snapshot("one")]
    world.settle()
    assert outcomes == [[None]] * 3


def test_folded_layers_leave_the_record() -> None:
    world = World(1)
    for name in ("a", "b"):
        world.snapshot(name)
        world.settle()
    removed(world, "a")
    world.settle()
    world.replicas["r0"].fold(1)
    world.structure.forget_folded()
    world.settle()
    assert [(layer.id, layer.parent) for layer in record_of(world).layers] == [(2, 0)]


def test_a_deletion_that_no_member_could_write_is_done_later() -> None:
    world = World(2)
    world.snapshot("one")
    world.settle()
    for replica in world.replicas.values():
        replica.refuse_control["remove"] = StorageError("disk full", errno=errno.ENOSPC)
    outcome = removed(world, "one")
    world.settle()
    assert outcome == [None]
    assert [layer.removed for layer in record_of(world).layers] == [True]
    world.structure.forget_folded()
    world.settle()
    assert len(world.engine.targets) == 2
    for replica in world.replicas.values():
        assert not replica.layers[1].removed
        replica.refuse_control.clear()
    world.structure.forget_folded()
    world.settle()
    assert all(replica.layers[1].removed for replica in world.replicas.values())
    assert len(record_of(world).layers) == 1


# ---- grow -------------------------------------------------------------------------------------


def grown(world: World, size_bytes: int) -> list[BlockdError | None]:
    outcome: list[BlockdError | None] = []
    world.structure.grow(size_bytes, outcome.append)
    return outcome


def test_every_member_is_larger_before_the_record_is() -> None:
    world = World(2, size_bytes=2 << 20)
    larger = 4 * world.size_bytes
    world.authority.away = True
    outcome = grown(world, larger)
    world.settle()
    assert outcome == []
    assert [replica.size_bytes for replica in world.replicas.values()] == [larger] * 2
    assert record_of(world).size_bytes == world.size_bytes
    before = record_of(world).config_seq
    world.authority.away = False
    world.clock.advance(1)
    world.settle()
    assert outcome == [None]
    assert record_of(world).size_bytes == larger
    assert record_of(world).config_seq == before + 1
    assert all(r.config_seq == before + 1 for r in world.replicas.values()), "old records are told"


def test_a_volume_cannot_shrink_and_may_stay_as_it_is() -> None:
    world = World(2, size_bytes=2 << 20)
    outcomes = [grown(world, world.size_bytes - BLOCK_BYTES), grown(world, world.size_bytes)]
    world.settle()
    assert isinstance(outcomes[0][0], RequestError)
    assert "cannot shrink" in str(outcomes[0][0])
    assert outcomes[1] == [None]
    with pytest.raises(RequestError, match="multiple"):
        world.structure.grow(world.size_bytes + 1, lambda error: None)
    assert record_of(world).config_seq == 0


def test_a_member_that_is_lost_while_it_grows_is_out_before_the_volume_is_larger() -> None:
    """Its answer is the last one to come, and comes as an error."""
    world = World(2, size_bytes=2 << 20)
    world.pipes["r1"].stalled = True
    outcome = grown(world, 4 << 20)
    world.settle()
    world.engine.fail(world.link("r1"), "killed")
    world.settle()
    assert outcome == [None]
    for record in (*world.authority.history, record_of(world)):
        assert record.size_bytes == 2 << 20 or record.members["r1"].state == OUT


def test_the_last_member_is_lost_while_it_grows_and_the_volume_stays_as_it_is() -> None:
    """Another one had grown, and was lost before: it is OUT, and the last one is all there is."""
    world = World(2, size_bytes=2 << 20)
    world.pipes["r1"].stalled = True
    outcome = grown(world, 4 << 20)
    world.settle()
    assert world.replicas["r0"].size_bytes == 4 << 20
    world.authority.away = True
    world.engine.fail(world.link("r0"), "killed")
    world.engine.fail(world.link("r1"), "killed")
    world.settle()
    world.authority.away = False
    world.clock.advance(1)
    world.settle()
    assert isinstance(outcome[0], StateError)
    record = record_of(world)
    assert record.size_bytes == 2 << 20
    assert [member.state for member in record.members.values()].count(IN_SYNC) == 1


def test_a_member_that_cannot_grow_is_put_out_before_the_volume_is_larger() -> None:
    world = World(3, size_bytes=2 << 20)
    full = StorageError("disk full", errno=errno.ENOSPC)
    world.replicas["r1"].refuse_control["grow"] = full
    assert grown(world, 2 * world.size_bytes) == []
    world.settle()
    record = record_of(world)
    assert record.size_bytes == 2 * world.size_bytes
    assert record.members["r1"].state == OUT
    for replica in world.replicas.values():
        replica.refuse_control["grow"] = full
    outcome = grown(world, 3 * world.size_bytes)
    world.settle()
    assert isinstance(outcome[0], StorageError)
    assert record_of(world).size_bytes == 2 * world.size_bytes
    assert record_of(world).members["r0"].state == IN_SYNC


# ---- revert -----------------------------------------------------------------------------------


def test_a_revert_brings_back_the_content_and_keeps_later_snapshots() -> None:
    world = World(2)
    world.write(0, BLOCK)
    world.snapshot("old")
    world.settle()
    old = bytes(world.model)
    world.write(0, b"\x43" * BLOCK_BYTES)
    world.snapshot("new")
    world.settle()
    outcome = reverted(world, "old")
    world.settle()
    assert outcome == [None]
    for replica in world.replicas.values():
        assert replica.content() == old
        assert replica.content(2)[:BLOCK_BYTES] == b"\x43" * BLOCK_BYTES
    record = record_of(world)
    assert record.pending is None
    assert (record.head_id, record.head_parent) == (world.replicas["r0"].head_id, 1)
    world.model[:] = old
    world.check_members()


def test_a_revert_is_named_in_the_record_before_any_member_does_it() -> None:
    world = World(2)
    world.snapshot("one")
    world.settle()
    reverted(world, "one")
    world.settle_until(
        lambda: any(r.controls[-1]["do"] == "revert" for r in world.replicas.values())
    )
    assert record_of(world).pending == {"layer_id": 1, "new_head_id": 3}


def test_a_revert_everybody_refuses_did_not_happen() -> None:
    world = World(2)
    world.snapshot("one")
    world.settle()
    for replica in world.replicas.values():
        replica.refuse_control["revert"] = StorageError("disk full", errno=errno.ENOSPC)
    outcome = reverted(world, "one")
    world.settle()
    assert isinstance(outcome[0], StorageError)
    assert record_of(world).pending is None
    assert record_of(world).head_id == 2


def test_a_revert_stays_pending_when_the_last_member_died_during_it() -> None:
    world = World(1)
    world.snapshot("one")
    world.settle()
    world.pipes["r0"].muted = True
    outcome = reverted(world, "one")
    world.settle()
    assert world.replicas["r0"].head_id == 3
    world.lose("r0")
    world.settle()
    assert outcome[0] is not None
    assert record_of(world).pending == {"layer_id": 1, "new_head_id": 3}


def test_a_rebuild_excludes_a_revert() -> None:
    world = World(2)
    world.snapshot("one")
    rebuilding(world)
    outcome = reverted(world, "one")
    assert isinstance(outcome[0], StateError)
    world.settle()
    assert world.state("r1") == IN_SYNC
    outcome = reverted(world, "one")
    world.settle()
    assert outcome == [None]


def test_a_snapshot_can_be_deleted_during_a_rebuild() -> None:
    world = World(2)
    for name in ("one", "two"):
        world.write(0, world.random.randbytes(3 * BLOCK_BYTES))
        world.snapshot(name)
        world.settle()
    rebuilding(world)
    outcome = removed(world, "one")
    world.settle()
    assert outcome == [None]
    assert world.state("r1") == IN_SYNC
    world.check_members()
    assert all(replica.layers[1].removed for replica in world.replicas.values())


def test_a_rebuild_that_is_being_recorded_excludes_a_revert() -> None:
    world = World(2)
    world.snapshot("one")
    world.settle()
    world.lose("r1")
    world.settle()
    world.reconnect("r1")
    world.rebuild("r1")
    assert isinstance(reverted(world, "one")[0], StateError)


# ---- plain functions ----------------------------------------------------------------------------


def test_children_of_dropped_layers_move_to_the_nearest_that_is_left() -> None:
    layers = (
        LayerRecord(1, 0),
        LayerRecord(2, 1, removed=True),
        LayerRecord(3, 2, removed=True),
        LayerRecord(4, 3, "d"),
        LayerRecord(5, 2, "e"),
    )
    record = Record("v", "v", 1, {}, layers=layers, head_id=6, head_parent=3)
    after = drop_layers(record, [2, 3])
    assert [(layer.id, layer.parent) for layer in after.layers] == [(1, 0), (4, 1), (5, 1)]
    assert after.head_parent == 1
    everything = drop_layers(replace(record, head_parent=1), [1, 2, 3, 4, 5])
    assert (everything.layers, everything.head_parent) == ((), 0)


@pytest.mark.parametrize(
    "labels",
    [
        {str(number): "" for number in range(LABELS_MAX + 1)},
        {"": "empty key"},
        {"key": 1},
        {1: "value"},
        {"k": "v" * LABEL_CHARACTERS_MAX},
    ],
)
def test_labels_beyond_the_limits_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(RequestError):
        check_labels(labels)


@pytest.mark.parametrize(
    "character",
    [
        "a",
        pytest.param(
            "\U0001f4be",
        ),
        pytest.param(
            '"',
        ),
    ],
)
def test_a_tree_with_the_largest_labels_fits_one_control_message(character: str) -> None:
    labels = {
        f"{number:02}": character * (LABEL_CHARACTERS_MAX - 2) for number in range(LABELS_MAX)
    }
    try:
        check_labels(labels)
    except RequestError:
        return
    layer = {
        "id": 1 << 31,
        "parent": 1 << 31,
        "name": "n" * 63,
        "created": "2" * 32,
        "labels": labels,
    }
    wire.json_frame(wire.CONTROL, 1, {"do": "begin_sync", "layers": [layer] * SNAPSHOTS_MAX})


def test_a_revert_asked_for_twice_by_one_id_is_done_once() -> None:
    world = World(2)
    world.write(0, BLOCK)
    world.snapshot("old")
    world.settle()
    outcome: list[BlockdError | None] = []
    world.structure.revert("old", outcome.append, "one")
    world.settle()
    world.write(0, b"\x43" * BLOCK_BYTES)
    world.settle()
    world.structure.revert("old", outcome.append, "one")  # its answer was lost
    world.settle()
    assert outcome == [None, None]
    for replica in world.replicas.values():
        assert replica.content()[:BLOCK_BYTES] == b"\x43" * BLOCK_BYTES
    world.structure.revert("old", outcome.append, "two")
    world.settle()
    for replica in world.replicas.values():
        assert replica.content()[:BLOCK_BYTES] == BLOCK


def test_a_revert_everybody_refused_is_done_when_it_is_asked_for_again() -> None:
    world = World(2)
    world.snapshot("one")
    world.settle()
    for replica in world.replicas.values():
        replica.refuse_control["revert"] = StorageError("disk full", errno=errno.ENOSPC)
    outcome: list[BlockdError | None] = []
    world.structure.revert("one", outcome.append, "id")
    world.settle()
    assert isinstance(outcome[0], StorageError)
    for replica in world.replicas.values():
        replica.refuse_control.clear()
    world.structure.revert("one", outcome.append, "id")
    world.settle()
    assert outcome[1] is None
    assert record_of(world).head_parent == 1


def test_a_snapshot_at_the_limit_on_a_full_disk_is_refused() -> None:
    world = World(2)
    world.snapshot("one")
    world.settle()
    engine = world.engine
    layers = tuple(
        LayerRecord(1000 + number, 0, name="", removed=True) for number in range(SNAPSHOTS_MAX)
    )
    engine.ledger.change(lambda record: replace(record, layers=layers), lambda error: None)
    world.settle()
    engine.room.full[world.link("r0")] = 1
    outcome = world.snapshot("two")
    world.settle()
    assert isinstance(outcome[0], StateError)
    assert not world.structure.busy
