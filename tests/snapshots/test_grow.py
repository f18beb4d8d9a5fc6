"""Proves that a replica that grows keeps everything and is usable to its new end, also when it is
stopped half way, when the disk is full, and when it learns of the new size by being made equal."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import RequestError, StateError, StorageError
from protocol.units import BLOCK_BYTES, ZONE_BYTES
from snapshots.layer import layer_path
from snapshots.replica import Replica
from tests.snapshots.equalize import Sync
from tests.snapshots.model import (
    BLOCK_COUNT,
    SIZE_BYTES,
    ZERO,
    ZONE,
    Model,
    fill,
    grown,
    kill,
    read_blocks,
    write,
)

LARGER = SIZE_BYTES + 5 * ZONE_BYTES + 3 * BLOCK_BYTES
LAST = LARGER // BLOCK_BYTES - 1


def use_new_part(model: Model) -> None:
    """Write across the old end and at the new one, read it back in every way."""
    replica = model.replica
    assert read_blocks(replica, BLOCK_COUNT, 300) == [ZERO] * 300
    write(replica, BLOCK_COUNT - 1, [5, 6])
    model.live[BLOCK_COUNT - 1] = 5
    write(replica, LAST, [7])
    assert read_blocks(replica, BLOCK_COUNT - 1, 2) == [fill(5), fill(6)]
    assert read_blocks(replica, LAST, 1) == [fill(7)]
    runs = replica.extents(BLOCK_COUNT, LAST + 1 - BLOCK_COUNT, 0)
    assert sum(count for count, data in runs if data) == 2


@pytest.mark.parametrize("seed", range(5))
def test_all_that_was_there_stays_and_the_new_part_is_usable(seed: int, tmp_path: Path) -> None:
    model = grown(tmp_path / "replica", seed)
    model.replica.grow(LARGER)
    model.check()
    use_new_part(model)
    model.check(extents=False)
    newest = model.seal()
    write(model.replica, LAST, [8])
    for again in (model.reopen, model.crash):
        again()
        assert model.replica.size_bytes == LARGER
        model.check(extents=False)
        assert read_blocks(model.replica, LAST, 1) == [fill(8)]
        assert read_blocks(model.replica, LAST, 1, newest) == [fill(7)]
    oldest = min(model.snapshots)
    model.revert(oldest)
    model.check(extents=False)
    assert read_blocks(model.replica, LAST, 1) == [ZERO]


def test_a_replica_does_not_shrink(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.write(0, [1])
    model.replica.grow(SIZE_BYTES - BLOCK_BYTES)
    assert model.replica.size_bytes == SIZE_BYTES
    with pytest.raises(RequestError, match="multiple"):
        model.replica.grow(SIZE_BYTES + 1)
    model.replica.grow(SIZE_BYTES)
    model.check()


def test_no_flush_may_run_meanwhile(tmp_path: Path) -> None:
    replica = Model(tmp_path / "replica").replica
    job = replica.flush_begin()
    with pytest.raises(StateError, match="flush"):
        replica.grow(LARGER)
    job.run()
    replica.flush_end(job)
    replica.grow(LARGER)


def test_zones_that_others_may_lack_stay_dirty(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    replica = model.replica
    replica.shared = True
    model.write(0, [1])
    model.write(ZONE, [2])
    replica.flush()
    replica.stable(replica.flushes_done, 3)
    while replica.maintain():
        pass
    model.write(ZONE, [3])
    replica.grow(LARGER)
    while replica.maintain():
        pass
    assert replica.dirty.dirty_zones() == [1]
    replica.stable(replica.flushes_done, 4)
    while replica.maintain():
        pass
    assert replica.dirty.dirty_zones() == []
    assert replica.dirty.changed_since(4) == [1]


@pytest.mark.parametrize("full", ["log", "json", "ftruncate"])
def test_a_full_disk_changes_nothing(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown(tmp_path / "replica", 3)
    model.replica.flush()

    def refuse(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if full == "log":
            patch.setattr("snapshots.directory.write_all", refuse)
        elif full == "json":
            patch.setattr("snapshots.metadata.write_all", refuse)
        else:
            patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(StorageError) as caught:
            model.replica.grow(16 << 30)  # a longer dirty log, too
        assert caught.value.errno == errno.ENOSPC
    assert model.replica.size_bytes == SIZE_BYTES
    model.check()
    model.reopen()
    assert model.replica.size_bytes == SIZE_BYTES
    model.check()
    model.replica.grow(LARGER)
    use_new_part(model)


def test_files_that_are_too_short_or_no_whole_regions_are_refused(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.replica.close()
    path = layer_path(os.fspath(model.path), 1)
    for change in (-BLOCK_BYTES, 1):
        length = os.stat(path).st_size
        os.truncate(path, length + change)
        with pytest.raises(StorageError, match="bytes long"):
            Replica.open(model.path)
        os.truncate(path, length)
    Replica.open(model.path).close()


def test_a_member_that_was_away_grows_when_it_is_made_equal(tmp_path: Path) -> None:
    source = grown(tmp_path / "a", 7)
    source.replica.flush()
    target = Model(tmp_path / "b").replica
    Sync(source.replica, target, 0).run()
    source.replica.grow(LARGER)
    use_new_part(source)
    sync = Sync(source.replica, target, 0)
    sync.begin()
    assert target.size_bytes == LARGER
    assert not sync.new, "what it had is still there"
    kill(target)  # in the middle
    target = Replica.open(tmp_path / "b")
    assert target.size_bytes == LARGER
    Sync(source.replica, target, 0).run()
    assert read_blocks(target, LAST, 1) == [fill(7)]
    for block in (0, BLOCK_COUNT - 1, BLOCK_COUNT):
        assert read_blocks(target, block, 1) == read_blocks(source.replica, block, 1)


def test_growing_takes_no_space_but_that_of_the_dirty_log(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.replica.flush()
    before = model.replica.allocated_bytes()
    model.replica.grow(1 << 40)
    zones = (1 << 40) // ZONE_BYTES
    assert model.replica.allocated_bytes() - before <= zones * 8 + (64 << 10)


def test_a_replica_larger_than_its_volume_keeps_its_content_when_it_is_made_equal(
    tmp_path: Path,
) -> None:
    source, target = grown(tmp_path / "a", 7), Model(tmp_path / "b").replica
    source.replica.flush()
    Sync(source.replica, target, 0).run()
    target.grow(LARGER)
    sync = Sync(source.replica, target, 0).run()
    assert (sync.new, sync.copied_blocks) == (set(), 0)
    assert target.size_bytes == LARGER
    assert read_blocks(target, BLOCK_COUNT, 2) == [ZERO] * 2


def test_what_is_prepared_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown(tmp_path / "replica", 3)
    model.replica.flush()
    model.replica.prepare_to_grow(16 << 30)()
    model.check()
    synced: list[int] = []
    monkeypatch.setattr("snapshots.layer.os.fsync", synced.append)
    model.replica.grow(16 << 30)
    assert len(synced) <= 2, "replica.json and its directory"
    model.check()
