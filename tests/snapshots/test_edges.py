"""Refusals and failures at the edges: each is one of the error families and harms nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConflictError, RequestError, StorageError
from snapshots import directory
from snapshots.metadata import MetadataFile
from snapshots.replica import Replica
from snapshots.reserve import Reserve
from snapshots.zeroed import ZeroedMarks
from tests.snapshots.model import SIZE_BYTES, ZONE, Model


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
    replica.begin_sync(replica.tree(), 1, "v", "v", 2 << 20)
    assert os.fstat(old.fd).st_nlink == 0
    assert os.fstat(old.fd).st_size == len(old.memory)


@pytest.mark.parametrize("region", [-1, 10, 1 << 40])
def test_a_region_that_does_not_exist_is_refused(region: int, tmp_path: Path) -> None:
    replica = Model(tmp_path / "replica").replica
    with pytest.raises(RequestError, match="region"):
        replica.layer_read(1, region, memoryview(bytearray(5 << 20)))
    with pytest.raises(RequestError, match="region"):
        replica.layer_write(1, region, memoryview(bytes(4096)), memoryview(b""))


def test_a_region_whose_data_is_not_what_its_entries_name_is_refused(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.write(0, [1])
    entries = memoryview(model.replica.head.map_block(0))
    for data in (b"", bytes(4095), bytes(8192)):
        with pytest.raises(RequestError, match="bytes of data"):
            model.replica.layer_write(1, 0, entries, memoryview(data))
    with pytest.raises(RequestError, match="map entries"):
        model.replica.layer_write(1, 0, entries[:-4], memoryview(bytes(4096)))
    model.check()
