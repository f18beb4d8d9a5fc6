"""Refusals and failures at the edges: each is one of the error families and harms nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from pathlib import Path
from typing import Any

import pytest

from protocol.checksum import block_checksum
from protocol.errors import ConflictError, RequestError, StateError, StorageError
from snapshots import directory
from snapshots.metadata import MetadataFile
from snapshots.replica import Replica
from snapshots.reserve import Reserve
from snapshots.zeroed import ZeroedMarks
from tests.snapshots.equalize import tree_of
from tests.snapshots.model import REGION, SIZE_BYTES, ZONE, Model, fill


class Killed(BaseException):
    """The process ends here."""


def broken(*_: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("step", [(directory, "sync_directory"), (MetadataFile, "write")])
def test_create_goes_on_where_a_killed_create_stopped(
    step: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    path = tmp_path / "replica"
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(*step, killed)
        Replica.create(path, size_bytes=SIZE_BYTES, replica_uuid="r")
    assert os.listdir(path)
    Replica.create(path, size_bytes=SIZE_BYTES, replica_uuid="r")
    Replica.open(path).close()
    with pytest.raises(ConflictError, match="already"):
        Replica.create(path, size_bytes=SIZE_BYTES, replica_uuid="r")


@pytest.mark.parametrize("name", ["photo.jpg", "layers/photo.jpg"])
def test_create_refuses_a_directory_with_something_of_others(name: str, tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    (tmp_path / name).write_text("x")
    with pytest.raises(RequestError, match=name):
        Replica.create(tmp_path, size_bytes=SIZE_BYTES, replica_uuid="r")
    assert (tmp_path / name).read_text() == "x"


def test_revert_marks_all_zones_with_one_synced_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "replica")
    model.seal()
    for zone in range(3):
        model.write(zone * ZONE, [1])
    model.replica.flush()
    while model.replica.maintain():
        pass
    assert not model.replica.dirty.dirty_zones()
    synced, real = [], os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_DSYNC:
            synced.append(fd)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", pwritev)
    model.revert(1)
    assert synced == [model.replica.dirty.fd]
    model.check()


def test_a_dirty_log_that_cannot_be_cleared_does_not_fail_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "replica")
    model.write(0, [1])
    model.replica.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", broken)
        while model.replica.maintain():
            pass
    model.write(0, [2])  # sets the bit again, durably
    model.crash()
    assert model.replica.recovered_zones == [0]
    model.check()


def test_system_calls_that_fail_are_storage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Reserve(os.fspath(tmp_path))
    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(StorageError) as caught:
        kept.release()
    assert caught.value.errno == errno.EIO
    (tmp_path / "1.zeroed").touch()
    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(StorageError) as caught:
        ZeroedMarks(os.fspath(tmp_path / "1.layer"), 4096)
    assert caught.value.errno == errno.EIO


def test_begin_sync_leaves_a_mapped_index_as_long_as_it_is(tmp_path: Path) -> None:
    replica = Model(tmp_path / "replica").replica
    old = replica.index
    replica.begin_sync(tree_of(replica), 1, "v", "v", 2 << 20, fresh=True)
    assert os.fstat(old.fd).st_nlink == 0
    assert os.fstat(old.fd).st_size == len(old.memory)


def incomplete(path: Path) -> Replica:
    replica = Model(path).replica
    replica.begin_sync(tree_of(replica), 1, "v", "v", replica.size_bytes)
    return replica


@pytest.mark.parametrize(
    ("first", "count"), [(-1, 1), (0, 0), (10 * REGION, 1), (1 << 40, 1), (REGION - 1, 2)]
)
def test_blocks_that_are_not_of_one_region_are_refused(
    first: int, count: int, tmp_path: Path
) -> None:
    replica = incomplete(tmp_path / "replica")
    with pytest.raises(RequestError, match="region"):
        replica.layer_read(1, 0, first, count, memoryview(bytearray(5 << 20)))
    with pytest.raises(RequestError, match="region"):
        replica.layer_digests(1, 0, first, count)
    entries = memoryview(bytes(4 * count)).cast("I")
    with pytest.raises(RequestError, match="region"):
        replica.layer_write(1, 0, first, entries, memoryview(b""))


def test_data_that_is_not_what_its_entries_name_is_refused(tmp_path: Path) -> None:
    replica = incomplete(tmp_path / "replica")
    entries = memoryview(array("I", [block_checksum(fill(1)), 0, 3]))
    for data in (b"", bytes(4095), bytes(8192)):
        with pytest.raises(RequestError, match="bytes of data"):
            replica.layer_write(1, 0, 0, entries, memoryview(data))


def test_layers_of_a_complete_replica_are_not_written(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    with pytest.raises(StateError, match="incomplete"):
        model.replica.layer_write(1, 0, 0, memoryview(bytes(4)).cast("I"), memoryview(b""))


def test_a_tree_that_cannot_be_made_from_the_own_one_is_refused_and_changes_nothing(
    tmp_path: Path,
) -> None:
    model = Model(tmp_path / "replica")
    model.write(0, [1])
    model.seal()
    model.write(0, [2])
    stranger = {"name": "x", "created": "", "labels": {}, "removed": False}
    tree = [{"id": 1, "parent": 0, **stranger}, {"id": 9, "parent": 1, **stranger}]
    tree += [{"id": 2, "parent": 9, **stranger}]
    with pytest.raises(StateError, match="filled anew"):
        model.replica.begin_sync(tree, 2, "v", "v", model.replica.size_bytes)
    model.check()
    many = [{"id": n, "parent": n - 1, **stranger} for n in range(1, 257)]
    with pytest.raises(StateError, match="slots"):
        model.replica.begin_sync(many, 256, "v", "v", model.replica.size_bytes)
    model.check()
    model.reopen()
    model.check()
