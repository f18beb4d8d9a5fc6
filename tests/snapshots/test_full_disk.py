"""A full disk is an error for the call that needs space and changes nothing; no call is lost later.

Space is refused at every single allocation in turn: by fallocate, and by pwrite and pwritev where
the file has a hole. A second test fills a real, small tmpfs where mounting one is allowed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.checksum import block_checksums
from protocol.errors import StorageError
from snapshots import syscalls
from snapshots.replica import Replica
from tests.snapshots.model import BLOCK_COUNT, REGION, SIZE_BYTES, Model, read_blocks
from tests.snapshots.model import write as write_numbers


class FullDisk:
    """Refuses the n-th request for space."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.requests_left = -1
        self._allocated: set[tuple[int, int]] = set()  # (inode, page) that fallocate has given
        fallocate, pwrite, open_file = syscalls.fallocate, os.pwrite, os.open

        def checked_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
            pages = _pages(fd, offset, length)
            if mode & syscalls.FALLOC_FL_PUNCH_HOLE:
                self._allocated -= pages
            else:
                self._request(fd, offset, length)
                self._allocated |= pages
            fallocate(fd, mode, offset, length)

        def checked_pwrite(fd: int, data: Any, offset: int) -> int:
            self._request(fd, offset, len(data))
            return pwrite(fd, data, offset)

        def checked_open(path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
            if flags & os.O_CREAT and not os.path.exists(path):
                self._refuse_in_turn()
            return open_file(path, flags, mode, **rest)

        patch.setattr(syscalls, "fallocate", checked_fallocate)
        patch.setattr(os, "pwrite", checked_pwrite)
        patch.setattr(os, "open", checked_open)

    def _request(self, fd: int, offset: int, length: int) -> None:
        if _pages(fd, offset, length) <= self._allocated:
            return
        try:
            has_hole = os.lseek(fd, offset, os.SEEK_HOLE) < offset + length
        except OSError:
            has_hole = True
        if has_hole:
            self._refuse_in_turn()

    def _refuse_in_turn(self) -> None:
        if self.requests_left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.requests_left -= 1


def _pages(fd: int, offset: int, length: int) -> set[tuple[int, int]]:
    inode = os.fstat(fd).st_ino
    return {(inode, page) for page in range(offset >> 12, (offset + length + 4095) >> 12)}


def fill_up(replica: Replica, number: int, end: int) -> int:
    """Write until the disk is full; returns the first block that was refused."""
    for first in range(0, end, 64):
        try:
            write_numbers(replica, first, [number + first] * 64)
        except StorageError as error:
            refused = error.errno
            break
    assert refused == errno.ENOSPC
    return first


def prepared(path: Path) -> Model:
    """A snapshot and a head that holds some of its blocks, all clean."""
    model = Model(path)
    model.write(REGION - 4, list(range(1, 9)))
    model.seal()
    model.write(REGION - 2, [22, 23])
    model.reopen()
    return model


def write_mixed(model: Model) -> None:
    model.write(REGION - 6, list(range(31, 43)))


def write_with_zeros(model: Model) -> None:
    model.write(REGION - 4, [31, 0, 33, 0, 0, 36])


def zero(model: Model) -> None:
    model.zero(REGION - 6, 12)


def zero_reserving(model: Model) -> None:
    model.zero(REGION - 6, 12, keep_allocated=True)


def seal(model: Model) -> None:
    model.seal()


def revert(model: Model) -> None:
    model.revert(1)


@pytest.mark.parametrize(
    "operation", [write_mixed, write_with_zeros, zero, zero_reserving, seal, revert]
)
def test_a_call_refused_space_anywhere_changes_nothing(
    operation: Callable[[Model], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    for requests in range(100):
        disk.requests_left = -1
        model = prepared(tmp_path / str(requests))
        tree = model.replica.tree()
        disk.requests_left = requests
        refused = 0
        try:
            operation(model)
        except StorageError as error:
            refused = error.errno
        disk.requests_left = -1
        if refused:
            assert refused == errno.ENOSPC
            assert [(layer.id, layer.parent) for layer in model.replica.tree()] == [
                (layer.id, layer.parent) for layer in tree
            ]
            model.check()
            operation(model)  # space is there again
        else:
            assert requests > 1
            model.check()
            return
        model.check()
        model.crash()
        model.check()
        model.replica.close()
    raise AssertionError("the operation does not end")


def test_folding_refused_space_anywhere_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    for requests in range(30):
        disk.requests_left = -1
        model = prepared(tmp_path / str(requests))
        model.remove(1)
        disk.requests_left = requests
        for _ in range(20):
            with contextlib.suppress(StorageError):
                model.replica.maintain()
        disk.requests_left = -1
        model.check()
        while model.replica.maintain():
            model.check()
        assert [layer.id for layer in model.replica.tree()] == [2]
        model.reopen()
        model.check()
        model.replica.close()


def test_flush_refused_space_for_the_metadata_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "replica")
    model.write(0, [1])
    model.seal()
    disk = FullDisk(monkeypatch)
    disk.requests_left = 0
    with pytest.raises(StorageError) as caught:
        model.replica.flush()
    assert caught.value.errno == errno.ENOSPC
    disk.requests_left = -1
    model.replica.flush()
    model.crash()
    assert len(model.replica.tree()) == 2
    model.check()


def test_reserved_zeros_can_be_written_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(tmp_path / "replica")
    model.zero(0, 12, keep_allocated=True)
    before = model.replica.head.allocated_bytes()
    model.write(0, list(range(1, 13)))
    assert model.replica.head.allocated_bytes() == before
    model.check()


def test_creating_on_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    for requests in range(50):
        disk.requests_left = requests
        path = tmp_path / str(requests)
        try:
            Replica.create(path, size_bytes=SIZE_BYTES, replica_uuid="r")
        except StorageError:
            assert os.listdir(path) == []
        else:
            assert requests > 3
            return


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "blockd-test", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_really_full_disk_fills_empties_and_goes_on(small_disk: Path) -> None:
    path = small_disk / "replica"
    Replica.create(path, size_bytes=BLOCK_COUNT * 4096, replica_uuid="r")
    replica = Replica.open(path)
    written = fill_up(replica, 1, BLOCK_COUNT)
    assert written > 1000
    replica.flush()
    for first in range(0, written, 64):
        assert read_blocks(replica, first, 1) == [(first + 1).to_bytes(4, "little") * 1024]
    assert read_blocks(replica, written, 64) == [bytes(4096)] * 64
    replica.zero(0, 512)
    write_numbers(replica, written, [7] * 64)
    replica.seal(2, "full", "2026-01-01T00:00:00Z", {})
    refused = fill_up(replica, 100_000, written)
    replica.remove(1)  # folding on a full disk: shadowed blocks first, then in small steps
    while replica.maintain():
        pass
    assert [layer.id for layer in replica.tree()] == [2]
    assert read_blocks(replica, written, 1) == [(7).to_bytes(4, "little") * 1024]
    for first in range(512, written, 64):
        number = first + (100_000 if first < refused else 1)
        assert read_blocks(replica, first, 1) == [number.to_bytes(4, "little") * 1024]
    replica.promise(5)
    replica.close()


def test_reads_work_on_a_file_system_without_nowait_reads(small_disk: Path) -> None:
    """tmpfs refuses RWF_NOWAIT; a read that may not block is then a plain one."""
    path = small_disk / "replica"
    Replica.create(path, size_bytes=1 << 20, replica_uuid="r")
    replica = Replica.open(path)
    data = memoryview(b"n" * 8192)
    replica.write(0, 2, data, block_checksums(data))
    target = memoryview(bytearray(4 * 4100))
    assert replica.read_ranges([0], [1], target) == (1, 4100)
    assert replica.read_ranges([0], [4], target) == (1, 16 + 8192)
    replica.close()


LOOK_EVERYWHERE = """
import os, sys
from snapshots.replica import Replica
from tests.snapshots.model import read_blocks, write

path, size_bytes = sys.argv[1], 256 << 20
Replica.create(path, size_bytes=size_bytes, replica_uuid="r")
replica = Replica.open(path)
write(replica, 0, [1])
replica.seal(2, "one", "", {})
replica.flush()
with open(os.path.dirname(path) + "/ballast", "wb", buffering=0) as ballast:
    size = 1 << 20
    while size >= 4096:
        try:
            ballast.write(bytes(size))
        except OSError:
            size //= 2
last = size_bytes // 4096 - 1
for layer_id in (0, 1):
    assert read_blocks(replica, 0, 1, layer_id) == [b"\\1\\0\\0\\0" * 1024]
    assert read_blocks(replica, last, 1, layer_id) == [bytes(4096)]
    assert replica.extents(0, last, layer_id)[-1] == (last - 1, False)
assert replica.layer_regions(1, 0) == [(0, 1)]
replica.layer_check(2, 1, 0, size_bytes >> 22)
replica.layer_digests(2, 1, last - 1000, 100)
replica.zero(last - 10, 10)
replica.abandon()
Replica.open(path).close()
print("alive")
"""


def test_looking_where_nothing_was_written_needs_no_space(small_disk: Path) -> None:
    """On tmpfs a look at a hole through a mapping takes a page, or is a SIGBUS without space."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK_EVERYWHERE, str(small_disk / "replica")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
