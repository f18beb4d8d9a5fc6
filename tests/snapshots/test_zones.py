"""What the dirty log says of zones: which may differ from other members, since which configuration,
and whether the index page of a clean zone is what it was.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocol.units import BLOCK_BYTES
from snapshots.replica import Replica
from snapshots.store import FLUSHES_PER_INDEX_SYNC
from tests.snapshots.equalize import tree_of
from tests.snapshots.model import BLOCK_COUNT, REGION, ZONE, Model, kill


@pytest.fixture
def model(tmp_path: Path) -> Model:
    model = Model(tmp_path / "replica")
    model.replica.shared = True
    return model


def tidy(replica: Replica) -> None:
    """All background work that can be done."""
    while replica.maintain():
        pass


def test_a_zone_of_a_shared_replica_stays_dirty_until_it_is_stable(model: Model) -> None:
    replica = model.replica
    model.write(0, [1])
    replica.flush()
    first_flush = replica.flushes_done
    model.write(ZONE, [2])
    replica.flush()
    tidy(replica)
    assert replica.dirty.dirty_zones() == [0, 1]
    replica.stable(first_flush, 7)
    tidy(replica)
    assert replica.dirty.dirty_zones() == [1]
    replica.stable(replica.flushes_done, 9)
    tidy(replica)
    assert replica.dirty.dirty_zones() == []
    assert [replica.dirty.stamp(zone, 0) for zone in range(3)] == [7, 9, 0]


def test_a_zone_written_again_after_the_flush_that_is_stable_stays_dirty(model: Model) -> None:
    replica = model.replica
    model.write(0, [1])
    replica.flush()
    model.write(1, [1])
    replica.stable(replica.flushes_done, 7)
    tidy(replica)
    replica.flush()
    tidy(replica)
    assert replica.dirty.dirty_zones() == [0]


def test_zones_that_a_member_may_lack_are_the_dirty_and_the_later_ones(model: Model) -> None:
    replica = model.replica
    for zone, config in ((0, 3), (1, 5)):
        model.write(zone * ZONE, [1])
        replica.flush()
        replica.stable(replica.flushes_done, config)
        tidy(replica)
    model.write(2 * ZONE, [1])
    assert replica.dirty.changed_since(0) == [0, 1, 2]
    assert replica.dirty.changed_since(4) == [1, 2]
    assert replica.dirty.changed_since(6) == [2]
    assert replica.dirty.stamp(2, 6) == 6


@pytest.mark.parametrize("clean", [True, False])
def test_stamps_and_unstable_zones_outlive_the_process(model: Model, clean: bool) -> None:
    replica = model.replica
    model.write(0, [1])
    replica.flush()
    replica.stable(replica.flushes_done, 3)
    tidy(replica)
    model.write(ZONE, [1])
    replica.flush()
    if clean:
        replica.close()
    else:
        kill(replica)
    again = Replica.open(model.path)
    assert again.recovered_zones == [1]
    assert again.dirty.changed_since(3) == [0, 1]
    assert again.dirty.changed_since(4) == [1]
    assert again.clean_start is clean


def test_a_zone_without_stable_word_is_dirty_after_a_clean_stop_and_not_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.write(0, [1])
    model.replica.close()
    read: list[int] = []
    monkeypatch.setattr(
        "snapshots.layer.LayerFile.map_block", lambda self, region: read.append(region)
    )
    assert Replica.open(model.path).recovered_zones == [0]
    assert read == []


def test_raised_stamps_are_kept_and_never_lowered(model: Model) -> None:
    replica = model.replica
    replica.dirty.raise_stamps({0: 4, 2: 9})
    replica.dirty.raise_stamps({0: 6, 2: 5})
    replica.dirty.sync()
    kill(replica)
    again = Replica.open(model.path)
    assert [again.dirty.stamp(zone, 0) for zone in range(3)] == [6, 0, 9]


@pytest.mark.parametrize("bit", [0, 3, 7])
@pytest.mark.parametrize("block", [0, 5, ZONE + 3])
def test_a_flipped_bit_in_the_index_page_of_a_clean_zone_is_mended(
    model: Model, block: int, bit: int
) -> None:
    model.replica.shared = False
    model.write(0, [1, 2])
    model.seal()
    model.write(1, [3])
    model.write(ZONE, [4])
    model.reopen()
    model.replica.close()
    with open(model.path / "index", "r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, block)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), block)
    model.replica = Replica.open(model.path)
    model.check()
    assert model.replica.index_errors == 1
    model.write(block, [9])
    model.crash()
    model.check()


def test_a_damaged_index_page_is_mended_before_a_write_makes_its_zone_dirty(model: Model) -> None:
    model.replica.shared = False
    model.write(0, [1, 2])
    model.replica.close()
    with open(model.path / "index", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\0", 1)
    model.replica = Replica.open(model.path)
    model.write(0, [5])
    model.check()


def test_the_dirty_log_of_a_large_volume_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large"
    Replica.create(path, size_bytes=1 << 40, replica_uuid="r")
    replica = Replica.open(path)
    last = (1 << 40) // BLOCK_BYTES - 1
    replica.zero(last, 1, keep_allocated=True)
    replica.zero(REGION, 1, keep_allocated=True)
    zones = [0, (1 << 40) // (ZONE * BLOCK_BYTES) - 1]
    assert replica.dirty.dirty_zones() == zones
    kill(replica)
    assert Replica.open(path).recovered_zones == zones
    assert last > BLOCK_COUNT


@pytest.mark.parametrize("clean", [True, False])
def test_a_replica_keeps_its_own_dirty_zones_until_it_is_equal(model: Model, clean: bool) -> None:
    """Others may not have what it wrote there; a first attempt may end before it has compared."""
    model.write(ZONE, [1])
    kill(model.replica)
    replica = Replica.open(model.path)
    replica.shared = True
    head_id, tree = replica.metadata.head_id, tree_of(replica)
    zones, _ = replica.begin_sync(tree, head_id, "v", "v", replica.size_bytes)
    assert zones == [1]
    for _ in range(FLUSHES_PER_INDEX_SYNC + 1):
        replica.flush()
        replica.stable(replica.flushes_done, 7)
    if clean:
        replica.close()
    else:
        kill(replica)
    replica = Replica.open(model.path)
    replica.shared = True
    assert replica.begin_sync(tree, head_id, "v", "v", replica.size_bytes) == ([1], [])
    replica.abandon()
