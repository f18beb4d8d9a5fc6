"""A write the disk refuses half-way leaves nothing that folding, zeroing or recovery can mistake.

The refusal is a short write followed by ENOSPC, as a nearly full disk makes it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import StorageError
from tests.snapshots.disk import VolatileDisk
from tests.snapshots.model import Model, fill, kill, read_blocks

FIRST, COUNT = 5, 8
MAP_PAGE = 1


def refuse_write(model: Model, first: int, count: int, patch: pytest.MonkeyPatch) -> None:
    """Try to write blocks; `count` of them reach the file, then the disk is full."""
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if fd != model.replica.head.fd:
            return real(fd, data, offset)
        if os.lseek(fd, offset, os.SEEK_HOLE) >= offset + len(data):
            return real(fd, data, offset)  # has its space already
        if len(data) <= 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:-4096], offset)

    with patch.context() as inner:
        inner.setattr(os, "pwrite", pwrite)
        with pytest.raises(StorageError) as caught:
            model.write(first, [900 + number for number in range(count + 1)])
    assert caught.value.errno == errno.ENOSPC


def over_a_deleted_snapshot(path: Path) -> Model:
    """Blocks of a deleted snapshot that are copied to the head's file but not named there yet."""
    model = Model(path)
    model.write(FIRST, list(range(1, COUNT + 1)))
    model.replica.flush()
    model.seal()
    model.replica.flush()
    model.remove(1)
    assert model.replica.maintain(inline_flush=False)
    return model


@pytest.mark.parametrize("count", [COUNT, 2 * COUNT])
def test_a_refused_write_over_copies_made_by_folding_loses_no_block(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = over_a_deleted_snapshot(tmp_path / "replica")
    refuse_write(model, FIRST, count, monkeypatch)
    model.check()
    while model.replica.maintain():
        model.check()
    assert [layer.id for layer in model.replica.tree()] == [2]
    model.check()
    model.crash()
    model.check()


def test_copies_damaged_in_the_head_are_made_again_by_folding(tmp_path: Path) -> None:
    model = over_a_deleted_snapshot(tmp_path / "replica")
    head = model.replica.head
    head.write(FIRST + 2, memoryview(fill(77)))
    while model.replica.maintain():
        model.check()
    assert [layer.id for layer in model.replica.tree()] == [2]
    model.check()


def test_a_step_of_folding_that_fails_after_storing_entries_still_waits_for_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "replica")
    model.write(FIRST, list(range(1, COUNT + 1)))
    model.seal()
    model.remove(1)
    replica = model.replica
    replica.maintain(4, inline_flush=False)
    replica.flush()
    parent = replica.layer_file(1)

    def broken(*_: Any) -> None:
        raise StorageError("unreadable", errno=errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(type(replica._folder), "_copy", broken)
        with pytest.raises(StorageError, match="unreadable"):
            replica.maintain(4, inline_flush=False)
    replica.maintain(4, inline_flush=False)
    assert len(parent.map_block(0).rstrip(b"\0")) > 0
    assert parent.map[1024 + FIRST] > 1  # the only durable copy


@pytest.mark.parametrize("refused", [False, True])
def test_old_bytes_under_reserved_zeros_do_not_come_back(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = VolatileDisk(tmp_path, monkeypatch)
    model = over_a_deleted_snapshot(tmp_path / "replica")
    if refused:
        model.zero(FIRST, COUNT, keep_allocated=True)
        model.replica.flush()
        refuse_write(model, FIRST, COUNT, monkeypatch)
    else:
        model.zero(FIRST, COUNT, keep_allocated=True)
    model.check()
    model.replica.flush()
    model.write(FIRST, [55] * COUNT)
    kill(model.replica)  # of the write the map entries survive, the data does not
    disk.cut_power_keeping(lambda name, page: page == MAP_PAGE)
    replica = type(model.replica).open(model.path)
    for content in read_blocks(replica, FIRST, COUNT):
        assert content in (bytes(4096), fill(55))


def test_a_refused_write_leaves_nothing_under_blocks_the_head_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = VolatileDisk(tmp_path, monkeypatch)
    model = Model(tmp_path / "replica")
    model.write(FIRST, list(range(1, COUNT + 1)))
    model.seal()
    model.replica.flush()
    refuse_write(model, FIRST, COUNT, monkeypatch)
    model.replica.flush()
    model.write(FIRST, [55] * COUNT)
    kill(model.replica)
    disk.cut_power_keeping(lambda name, page: page == MAP_PAGE)
    replica = type(model.replica).open(model.path)
    for number, content in enumerate(read_blocks(replica, FIRST, COUNT)):
        assert content in (fill(number + 1), fill(55))
