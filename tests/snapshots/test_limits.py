"""254 snapshots fit, the 255th is refused, and any order of deletion leaves the others right.

Also: space comes back after zeroing and after deletion, and prepared snapshots get names later.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from protocol.errors import ConflictError, StateError
from protocol.units import SNAPSHOTS_MAX
from snapshots.replica import Replica
from tests.snapshots.equalize import tree_of
from tests.snapshots.model import RANGES, REGION, SIZE_BYTES, Model, fill, read_blocks


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "replica")


def test_254_snapshots_are_kept_and_deleted_in_any_order(model: Model) -> None:
    random = Random(254)
    for number in range(SNAPSHOTS_MAX):
        first, count = random.choice(RANGES)
        model.write(first + random.randrange(count), [number + 1])
        if number % 5 == 0:
            model.zero(first, 2)
        model.seal()
    with pytest.raises(StateError, match=r"limit is 254; delete a snapshot"):
        model.replica.seal(9999, "one-too-many", "", {})
    model.check(extents=False)
    model.reopen()
    model.check(extents=False)
    order = sorted(model.snapshots)
    random.shuffle(order)
    model.remove(order.pop())
    with pytest.raises(StateError, match="wait for the folding"):
        model.replica.seal(9999, "one-too-many", "", {})
    while model.replica.maintain():
        pass
    model.seal()
    while order:
        for _ in range(min(64, len(order))):
            model.remove(order.pop())
        model.check(extents=False)
        for _ in range(random.randrange(200)):
            model.replica.maintain(random.choice((1, 5, 256)))
        model.check(extents=False)
    while model.replica.maintain():
        pass
    model.check(extents=False)
    assert len(model.replica.tree()) == len(model.snapshots) + 1


def test_space_comes_back_after_zeroing(model: Model) -> None:
    model.write(0, [1] * 12)
    used = model.replica.allocated_bytes()
    model.zero(0, 12)
    assert model.replica.allocated_bytes() <= used - 12 * 4096
    model.seal()
    model.write(0, [1] * 12)
    used = model.replica.allocated_bytes()
    model.zero(0, 12)
    assert model.replica.allocated_bytes() <= used - 12 * 4096 + 4096  # the marks of the zone


def test_reserved_zeros_are_given_back_by_trimming(model: Model) -> None:
    model.zero(0, 12, keep_allocated=True)
    used = model.replica.head.allocated_bytes()
    model.zero(0, 12)
    assert model.replica.head.allocated_bytes() <= used - 12 * 4096


def test_trimming_an_untouched_volume_allocates_nothing(model: Model) -> None:
    used = model.replica.allocated_bytes()
    model.zero(0, model.replica.block_count)
    assert model.replica.allocated_bytes() == used


def test_space_comes_back_after_deletion(model: Model) -> None:
    model.write(0, [1] * 12)
    model.write(REGION, [1] * 6)
    first = model.seal()
    model.write(0, [2] * 12)
    model.remove(first)
    while model.replica.maintain():
        pass
    blocks = sum(layer.allocated_bytes for layer in model.replica.tree()) // 4096
    assert blocks == 12 + 6 + 2 + 1  # data, two maps, the header
    model.check()


def test_a_removed_layer_with_two_children_waits_for_one_of_them(model: Model) -> None:
    model.write(0, [1, 2, 3])
    base = model.seal()
    model.write(0, [4])
    branch = model.seal()
    model.revert(base)
    model.write(1, [5])
    model.remove(base)
    while model.replica.maintain():
        pass
    assert base in {layer.id for layer in model.replica.tree()}
    model.check()
    model.remove(branch)
    while model.replica.maintain():
        pass
    assert len(model.replica.tree()) == 1
    model.check()


def test_a_prepared_snapshot_gets_its_name_later(model: Model) -> None:
    model.write(0, [1])
    model.replica.seal(2, "", "", {})
    model.replica.flush()
    model.replica.name_layer(1, "monday", "2026-01-05T00:00:00Z", {"a": "b"})
    model.reopen()
    (layer,) = (layer for layer in model.replica.tree() if layer.id == 1)
    assert (layer.name, layer.created, layer.labels) == (
        "monday",
        "2026-01-05T00:00:00Z",
        {"a": "b"},
    )
    model.replica.seal(3, "", "", {})
    with pytest.raises(ConflictError):
        model.replica.name_layer(2, "monday", "", {})


def test_sealed_layers_are_dropped_and_reopened_within_the_address_limit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        model.write(0, [number + 1])
        model.write(number + 1, [number + 1])
        model.seal()
    model.reopen()
    limit = 3 * model.replica.head.mapped_bytes
    monkeypatch.setattr("snapshots.store.MAPPED_BYTES_MAX", limit)
    model.check()
    assert sum(handle is not None for handle in model.replica.handles) <= 3
    assert read_blocks(model.replica, 0, 7) == [fill(number) for number in (6, 1, 2, 3, 4, 5, 6)]


def test_an_incomplete_replica_refuses_reads_and_stays_incomplete(model: Model) -> None:
    model.write(0, [1])
    model.replica.begin_sync(tree_of(model.replica), 1, "v", "name", 1 << 20)
    with pytest.raises(StateError, match="incomplete"):
        read_blocks(model.replica, 0, 1)
    model.replica.close()
    replica = Replica.open(model.path)
    assert not replica.complete
    assert replica.size_bytes == SIZE_BYTES, "a replica does not shrink"
    replica.end_sync()
    replica.close()
    assert Replica.open(model.path).complete
