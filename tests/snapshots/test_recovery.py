"""What opening does after a crash: only dirty zones, each block old or new, parents stay hidden.

The chosen power cuts are those where guessing wrong would bring back content older than the last
flush; random ones are in test_power_loss.py. A process is killed before every single system call of
a history that touches everything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshots.layer import LayerFile
from snapshots.replica import Replica
from tests.snapshots.disk import VolatileDisk
from tests.snapshots.equalize import tree_of
from tests.snapshots.killer import Killed, Killer
from tests.snapshots.model import (
    BLOCK_COUNT,
    REGION,
    SIZE_BYTES,
    ZERO,
    ZONE,
    Model,
    fill,
    kill,
    read_blocks,
)
from tests.snapshots.model import write as write_numbers

BLOCK = 5
MAP_PAGE, DATA_PAGE = 1, 2 + BLOCK


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path / "replica")


def over_a_snapshot(tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[Model, VolatileDisk]:
    """A model whose block has content 1 in a durable snapshot below a durable, empty head 2."""
    disk = VolatileDisk(tmp_path, patch)
    model = Model(tmp_path / "replica")
    model.write(BLOCK, [1])
    model.seal()
    model.replica.flush()
    return model, disk


def cut(model: Model, disk: VolatileDisk, kept: Callable[[str, int], bool]) -> bytes:
    """What the block reads as after a power cut."""
    kill(model.replica)
    disk.cut_power_keeping(kept)
    model.replica = Replica.open(model.path)
    return read_blocks(model.replica, BLOCK, 1)[0]


def test_a_new_block_whose_data_is_lost_shows_the_snapshot_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.write(BLOCK, [2])
    assert cut(model, disk, lambda name, page: page != DATA_PAGE) == fill(1)


def test_a_new_block_whose_map_entry_is_lost_shows_the_snapshot_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.write(BLOCK, [2])
    assert cut(model, disk, lambda name, page: page != MAP_PAGE) == fill(1)
    assert model.replica.extents(0, 8) == [(5, False), (1, True), (2, False)]


def test_a_lost_write_over_flushed_zeros_leaves_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.zero(BLOCK, 1)
    model.replica.flush()
    model.write(BLOCK, [2])
    assert cut(model, disk, lambda name, page: page != DATA_PAGE) == ZERO


def test_zeroing_whose_map_entry_is_lost_does_not_show_the_snapshot_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.write(BLOCK, [2])
    model.replica.flush()
    model.zero(BLOCK, 1)
    assert cut(model, disk, lambda name, page: page == DATA_PAGE) in (ZERO, fill(2))


def test_a_mark_without_its_entry_does_not_hide_the_snapshot_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.zero(BLOCK, 1)
    assert cut(model, disk, lambda name, page: name.endswith(".zeroed")) == fill(1)
    model.write(BLOCK, [2])
    assert cut(model, disk, lambda name, page: page != DATA_PAGE) == fill(1)


def test_an_entry_without_its_mark_keeps_hiding_the_snapshot_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.zero(BLOCK, 1)
    assert cut(model, disk, lambda name, page: not name.endswith(".zeroed")) == ZERO
    model.write(BLOCK, [2])
    assert cut(model, disk, lambda name, page: page != DATA_PAGE) == ZERO


def test_a_block_overwritten_in_place_without_its_entry_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, disk = over_a_snapshot(tmp_path, monkeypatch)
    model.write(BLOCK, [2])
    model.replica.flush()
    model.write(BLOCK, [3])
    assert cut(model, disk, lambda name, page: page == DATA_PAGE) == fill(3)


def test_a_seal_that_was_not_flushed_is_undone_by_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = VolatileDisk(tmp_path, monkeypatch)
    model = Model(tmp_path / "replica")
    model.write(BLOCK, [1])
    model.replica.flush()
    model.seal()
    model.write(BLOCK, [2])
    assert cut(model, disk, lambda name, page: True) == fill(1)
    assert [layer.id for layer in model.replica.tree()] == [1]
    assert sorted(os.listdir(model.path / "layers")) == ["1.layer"]


def test_a_killed_process_loses_no_write_before_or_after_an_unflushed_seal(model: Model) -> None:
    model.write(BLOCK, [1])
    model.replica.flush()
    model.write(BLOCK + 1, [2])
    model.seal()
    model.write(BLOCK, [3])
    model.seal()
    model.write(BLOCK + 2, [4])
    for _ in range(2):
        kill(model.replica)
        model.replica = Replica.open(model.path)
        assert [layer.id for layer in model.replica.tree()] == [1, 2, 3]
        model.check()
    assert not os.path.exists(model.path / "replica.pending.json")


def test_an_unflushed_seal_that_a_restart_took_over_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = VolatileDisk(tmp_path, monkeypatch)
    model = Model(tmp_path / "replica")
    model.write(BLOCK, [1])
    model.seal()
    kill(model.replica)
    model.replica = Replica.open(model.path)
    assert cut(model, disk, lambda name, page: False) == fill(1)
    assert [layer.id for layer in model.replica.tree()] == [1, 2]
    model.check()


def test_a_second_seal_during_the_flush_of_the_first_survives_a_kill(model: Model) -> None:
    model.write(BLOCK, [1])
    model.seal()
    job = model.replica.flush_begin()
    model.write(BLOCK, [2])
    model.seal()
    model.write(BLOCK, [3])
    job.run()  # replica.json now has the first seal only
    kill(model.replica)
    model.replica = Replica.open(model.path)
    assert [layer.id for layer in model.replica.tree()] == [1, 2, 3]
    model.check()


def test_a_note_of_a_seal_that_is_durable_already_is_ignored(model: Model) -> None:
    model.seal()
    model.replica.flush()
    model.remove(1)
    kill(model.replica)
    assert os.path.exists(model.path / "replica.pending.json")
    model.replica = Replica.open(model.path)
    assert model.replica.tree()[0].removed


def count_maps_read(patch: pytest.MonkeyPatch) -> list[int]:
    """Regions whose maps are read from now on."""
    regions: list[int] = []
    warm, map_block = LayerFile.warm, LayerFile.map_block

    def counting(self: LayerFile, region: int, flags: int = 0) -> bool:
        regions.append(region)
        return warm(self, region, flags)

    def counting_blocks(self: LayerFile, region: int) -> bytes:
        regions.append(region)
        return map_block(self, region)

    patch.setattr(LayerFile, "warm", counting)
    patch.setattr(LayerFile, "map_block", counting_blocks)
    return regions


def test_a_clean_open_reads_no_layer_map(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (0, ZONE, 2 * ZONE):
        model.write(first, [1])
    model.seal()
    model.replica.close()
    regions = count_maps_read(monkeypatch)
    model.replica = Replica.open(model.path)
    assert regions == []
    assert model.replica.recovered_zones == []
    model.check()


def test_recovery_reads_the_maps_of_dirty_zones_only(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first in (0, ZONE, 2 * ZONE):
        model.write(first, [1])
    model.reopen()
    model.write(ZONE + REGION, [1])
    model.replica.flush()
    kill(model.replica)
    regions = count_maps_read(monkeypatch)
    model.replica = Replica.open(model.path)
    assert model.replica.recovered_zones == [1]
    assert {4, 5} <= set(regions) <= {4, 5, 6, 7}


def test_idle_maintenance_clears_the_dirty_log(model: Model) -> None:
    model.write(0, [1])
    model.write(ZONE, [1])
    model.replica.flush()
    assert model.replica.dirty.dirty_zones() == [0, 1]
    while model.replica.maintain():
        pass
    kill(model.replica)
    model.replica = Replica.open(model.path)
    assert model.replica.recovered_zones == []
    model.check()


def test_a_zone_written_during_a_flush_stays_dirty(model: Model) -> None:
    model.write(0, [1])
    model.replica.flush()
    model.replica.maintain(inline_flush=False)
    job = model.replica.flush_begin()
    assert job.index is not None
    model.write(0, [2])
    other = model.replica.flush_begin()
    other.run()
    model.replica.flush_end(other)
    job.run()
    model.replica.flush_end(job)
    assert model.replica.dirty.dirty_zones() == [0]


BASE = REGION - 4  # eight blocks across a region bound; block n of the base holds 100 + n


def base(path: Path) -> Replica:
    """A replica with a flushed snapshot 1 and a flushed head 2 that has changed some of it."""
    Replica.create(path, size_bytes=BLOCK_COUNT * 4096, replica_uuid="r")
    replica = Replica.open(path)
    write_numbers(replica, BASE, list(range(100, 108)))
    replica.seal(2, "one", "2026-01-01T00:00:00Z", {})
    write_numbers(replica, BASE + 2, [202, 203])
    replica.flush()
    while replica.maintain():  # until no zone is dirty
        pass
    return replica


LIVE = [100, 101, 202, 203, 104, 105, 106, 107]
SNAPSHOT = list(range(100, 108))


def scenario_write(replica: Replica) -> None:
    write_numbers(replica, BASE + 1, [301, 302, 303, 304])


def scenario_zero(replica: Replica) -> None:
    replica.zero(BASE + 1, 5)


def scenario_write_with_zeros(replica: Replica) -> None:
    write_numbers(replica, BASE + 1, [301, 0, 0, 304])


def scenario_seal(replica: Replica) -> None:
    replica.seal(3, "two", "2026-01-01T00:00:00Z", {})
    write_numbers(replica, BASE + 2, [302])
    replica.flush()


def scenario_remove(replica: Replica) -> None:
    replica.remove(1)
    while replica.maintain(3):
        pass


def scenario_revert(replica: Replica) -> None:
    replica.revert(1, 3)
    replica.flush()


def scenario_grow(replica: Replica) -> None:
    replica.grow(SIZE_BYTES + (100 << 20))
    write_numbers(replica, BASE + 2, [302])
    write_numbers(replica, BLOCK_COUNT + 5, [303])
    replica.flush()


def scenario_close(replica: Replica) -> None:
    write_numbers(replica, BASE + 2, [302])
    replica.close()


# Scenario, the numbers each block of the base may then also have.
SCENARIOS: list[tuple[Callable[[Replica], None], list[int]]] = [
    (scenario_write, [100, 301, 302, 303, 304, 105, 106, 107]),
    (scenario_zero, [100, 0, 0, 0, 0, 0, 106, 107]),
    (scenario_write_with_zeros, [100, 301, 0, 0, 304, 105, 106, 107]),
    (scenario_seal, [100, 101, 302, 203, 104, 105, 106, 107]),
    (scenario_remove, LIVE),
    (scenario_revert, SNAPSHOT),
    (scenario_grow, [100, 101, 302, 203, 104, 105, 106, 107]),
    (scenario_close, [100, 101, 302, 203, 104, 105, 106, 107]),
]


@pytest.mark.parametrize(("scenario", "after"), SCENARIOS)
def test_killed_before_any_system_call_every_block_is_old_or_new(
    scenario: Callable[[Replica], None],
    after: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killer = Killer(monkeypatch)
    for calls in range(1000):
        killer.calls_left = -1
        replica = base(tmp_path / str(calls))
        killer.calls_left = calls
        try:
            scenario(replica)
        except Killed:
            finished = False
        else:
            finished = True
        killer.calls_left = -1
        kill(replica)
        check_old_or_new(tmp_path / str(calls), after, calls)
        if finished:
            assert calls >= 4  # otherwise nothing was tried
            return
    raise AssertionError("the scenario does not end")


def check_old_or_new(path: Path, after: list[int], calls: int) -> None:
    replica = Replica.open(path)
    for turn in range(2):
        live = read_blocks(replica, BASE, 8)
        for number, content in enumerate(live):
            assert content in (fill(LIVE[number]), fill(after[number])), (calls, number)
        for layer in replica.tree():
            if layer.id == 1 and layer.name and not layer.removed:
                assert read_blocks(replica, BASE, 8, 1) == [fill(n) for n in SNAPSHOT], calls
            if layer.name == "two":
                assert read_blocks(replica, BASE, 8, layer.id) == [fill(n) for n in LIVE], calls
        while replica.maintain():
            pass
        assert read_blocks(replica, BASE, 8) == live, (calls, turn)
        replica.close()
        replica = Replica.open(path)
    replica.close()


@pytest.mark.parametrize("step", range(40))
@pytest.mark.parametrize(
    ("size_bytes", "fresh"), [(2 << 20, False), (SIZE_BYTES, True), (SIZE_BYTES, False)]
)
def test_begin_sync_killed_anywhere_opens_as_incomplete_or_untouched(
    size_bytes: int, fresh: bool, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(monkeypatch)
    replica = base(tmp_path / "replica")
    tree = tree_of(replica)
    killer.calls_left = step
    with contextlib.suppress(Killed):
        replica.begin_sync(tree, 2, "v", "name", size_bytes, fresh=fresh)
    killer.calls_left = -1
    kill(replica)
    replica = Replica.open(tmp_path / "replica")
    if replica.complete:
        assert read_blocks(replica, BASE, 8) == [fill(number) for number in LIVE]
    else:
        _, new = replica.begin_sync(tree, 2, "v", "name", size_bytes, fresh=fresh)
        for zone in replica.dirty.dirty_zones():
            replica.index_zone(zone)
        replica.end_sync()
        if new:
            assert read_blocks(replica, 0, 4) == [ZERO] * 4
        else:
            assert read_blocks(replica, BASE, 8) == [fill(number) for number in LIVE]
    replica.close()
