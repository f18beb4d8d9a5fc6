"""Proves that a full disk under a replica is an honest error and never a lost or a wrong byte.

The disks are small file systems of the test's own (tmpfs, ext4 on a loop device): root is needed.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.nbd_client import NbdClient

MIB = 1 << 20
PIECE = 256 << 10


def small_disk(path: Path, kind: str, mebibytes: int) -> bool:
    """Mount a new file system at `path`; False (and nothing done) where that is impossible."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}M", "blockd-test", str(path)]
    if kind == "ext4":
        image = path.with_suffix(".img")
        with open(image, "wb") as file:
            file.truncate(mebibytes * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, timeout=30)
        command = ["mount", "-o", "loop", str(image), str(path)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


@contextmanager
def on_small_disks(
    directory: Path, full: list[int], kind: str = "ext4", mebibytes: int = 24
) -> Iterator[Cluster]:
    """Three replicas of 64 MiB; those in `full` have a disk that is much smaller."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted: list[Path] = []
    try:
        for number in full:
            path = directory / f"disk{number}"
            if not small_disk(path, kind, mebibytes):
                pytest.skip(f"this machine does not let root mount {kind}")
            mounted.append(path)
            (directory / f"replica{number}").symlink_to(path / "replica")
            (path / "replica").mkdir()
        with cluster(directory, size="64M") as made:
            yield made
    finally:
        for path in mounted:
            subprocess.run(["umount", str(path)], check=True, timeout=30)


def fill(client: NbdClient, source: random.Random) -> tuple[dict[int, bytes], int]:
    """Write until it fails: what was acknowledged by offset, and the error number (0: none)."""
    written: dict[int, bytes] = {}
    for offset in range(0, 60 * MIB, PIECE):
        data = source.randbytes(PIECE)
        try:
            client.write(offset, data)
        except OSError as error:
            return written, error.errno or -1
        written[offset] = data
    return written, 0


def check(client: NbdClient, written: dict[int, bytes]) -> None:
    for offset, data in written.items():
        assert client.read(offset, PIECE) == data, f"at {offset}"


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_when_all_disks_are_full_writes_fail_and_trim_makes_room(tmp_path: Path, kind: str) -> None:
    source = random.Random(5)
    with on_small_disks(tmp_path, [0, 1, 2], kind) as made:
        client = NbdClient(made.nbd)
        written, error = fill(client, source)
        assert error == errno.ENOSPC
        assert len(written) > 20
        for _ in range(3):
            check(client, written)
        for offset in range(62 * MIB, 64 * MIB, PIECE):
            with pytest.raises(OSError, match="failed") as refused:
                client.write(offset, source.randbytes(PIECE))
            assert refused.value.errno == errno.ENOSPC
        assert made.status()["health"] == "healthy", "nobody is behind: all refused alike"
        gone = list(written)[::2]
        for offset in gone:
            client.trim(offset, PIECE)
            del written[offset]
        client.flush()
        for offset in gone:
            assert client.read(offset, PIECE) == bytes(PIECE)
        for offset in gone[: len(gone) // 2]:
            data = source.randbytes(PIECE)
            poll("room again", lambda offset=offset, data=data: took(client, offset, data))
            written[offset] = data
        client.flush()
        client.close()
        made.volume.kill()
        for replica in made.replicas:
            replica.kill()
        made.start()
        client = NbdClient(made.nbd)
        for _ in range(3):
            check(client, written)
        client.close()


def took(client: NbdClient, offset: int, data: bytes) -> bool:
    try:
        client.write(offset, data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def test_one_full_disk_costs_that_member_and_no_request(tmp_path: Path) -> None:
    source, victim = random.Random(6), 0
    with on_small_disks(tmp_path, [victim]) as made:
        client = NbdClient(made.nbd)
        written, error = fill(client, source)
        assert error == 0, "two members had room: no request may fail"
        assert made.status()["health"] == "degraded"
        assert made.member(victim)["state"] == "OUT"
        for _ in range(3):
            check(client, written)
        for offset in list(written)[20:]:
            client.trim(offset, PIECE)
            del written[offset]
        client.flush()
        check(client, written)
        poll("back", lambda: made.member(victim)["connected"], seconds=10)
        made.rebuild(victim)
        assert made.status()["health"] == "healthy"
        for other in range(3):
            if other != victim:
                made.replicas[other].kill()
        check(client, written)
        client.close()


@contextmanager
def no_byte_left(disks: list[Path]) -> Iterator[None]:
    """Take all space that is left on these disks, and give it back."""
    for disk in disks:
        size = 65536
        with open(disk / "ballast", "wb", buffering=0) as ballast:
            while size >= 512:
                try:
                    ballast.write(bytes(size))
                except OSError:
                    size //= 2
    yield
    for disk in disks:
        (disk / "ballast").unlink()


def test_a_full_disk_refuses_a_snapshot_and_goes_on(tmp_path: Path) -> None:
    source = random.Random(7)
    with on_small_disks(tmp_path, [0, 1, 2]) as made:
        client = NbdClient(made.nbd)
        written, error = fill(client, source)
        assert error == errno.ENOSPC
        with no_byte_left([tmp_path / f"disk{number}" for number in range(3)]):
            answer = made.volume.ask("snapshot-create", name="one")
            if not answer["ok"]:
                assert answer["code"] == "storage", answer
                assert made.status()["snapshots"] == []
            check(client, written)
            assert made.status()["health"] == "healthy"
        client.trim(0, 4 * PIECE)
        for offset in range(0, 4 * PIECE, PIECE):
            written[offset] = bytes(PIECE)
        made.volume.must("snapshot-create", name="two")
        check(client, written)
        export = NbdClient(made.nbd, "vol@two")
        check(export, written)
        export.close()
        client.close()


def test_a_volume_on_full_disks_opens_again_and_can_be_trimmed(tmp_path: Path) -> None:
    source = random.Random(9)
    with on_small_disks(tmp_path, [0, 1, 2]) as made:
        client = NbdClient(made.nbd)
        written, error = fill(client, source)
        assert error == errno.ENOSPC
        client.flush()
        client.close()
        with no_byte_left([tmp_path / f"disk{number}" for number in range(3)]):
            for daemon in (made.volume, *made.replicas):
                daemon.kill()
            made.start()
            client = NbdClient(made.nbd)
            check(client, written)
            for offset in list(written)[::2]:
                client.trim(offset, PIECE)
                del written[offset]
            poll("room again", lambda: took(client, 0, b"r" * PIECE))
            written[0] = b"r" * PIECE
            client.flush()
            check(client, written)
            client.close()


def test_a_full_disk_under_the_local_replica_is_an_error_not_an_end(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk, source = tmp_path / "disk", random.Random(8)
    if not small_disk(disk, "ext4", 16):
        pytest.skip("this machine does not let root mount ext4")
    try:
        (disk / "replica").mkdir()
        (tmp_path / "replica0").symlink_to(disk / "replica")
        with cluster(tmp_path, replicas=1, size="64M", local=True) as made:
            client = NbdClient(made.nbd)
            written, error = fill(client, source)
            assert error == errno.ENOSPC
            check(client, written)
            client.trim(0, 8 * PIECE)
            for offset in range(0, 8 * PIECE, PIECE):
                del written[offset]
            poll("room again", lambda: took(client, 0, b"r" * PIECE))
            written[0] = b"r" * PIECE
            client.flush()
            check(client, written)
            assert made.status()["health"] == "healthy"
            client.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)
