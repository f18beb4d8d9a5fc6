"""Proves that a full disk under a replica makes writes wait and never costs a byte: reads, trims
and the deletion of snapshots go on, and so do the writes once there is room, whoever made it.

The disks are small file systems of the test's own (tmpfs, ext4 on a loop device): root is needed.
"""

from __future__ import annotations

import os
import random
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.nbd_client import READ, WRITE, NbdClient

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


@dataclass
class Waits:
    """A write without an answer."""

    client: NbdClient
    cookie: int
    offset: int
    data: bytes

    def is_answered(self) -> bool:
        """Has anything arrived?"""
        poll = select.poll()
        poll.register(self.client.socket, select.POLLIN)
        return bool(poll.poll(0))

    def done(self) -> None:
        """Wait for the answer, which is success."""
        assert self.client.receive({}) == (self.cookie, 0, b"")
        self.client.close()


def fill(made: Cluster, source: random.Random) -> tuple[dict[int, bytes], Waits | None]:
    """Write until one waits for space: what was answered by offset, and what waits."""
    written: dict[int, bytes] = {}
    client = NbdClient(made.nbd)
    for offset in range(0, 60 * MIB, PIECE):
        data = source.randbytes(PIECE)
        waits = Waits(client, client.send(WRITE, offset, data=data), offset, data)
        if not waits.is_answered():
            poll("an answer or a pause", partial(_answered_or_paused, made, waits))
        if not waits.is_answered():
            return written, waits
        assert client.receive({})[1] == 0
        written[offset] = data
    client.close()
    return written, None


def _answered_or_paused(made: Cluster, waits: Waits) -> bool:
    return waits.is_answered() or bool(made.status()["paused"])


def check(client: NbdClient, written: dict[int, bytes]) -> None:
    for offset, data in written.items():
        assert client.read(offset, PIECE) == data, f"at {offset}"


def trim_half(client: NbdClient, written: dict[int, bytes]) -> None:
    """Give back the space of every second piece."""
    for offset in list(written)[::2]:
        client.trim(offset, PIECE)
        del written[offset]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_when_disks_are_full_writes_wait_until_a_trim_makes_room(tmp_path: Path, kind: str) -> None:
    source = random.Random(5)
    with on_small_disks(tmp_path, [0, 1, 2], kind) as made:
        written, waits = fill(made, source)
        assert waits is not None
        assert len(written) > 20
        client = NbdClient(made.nbd)
        for _ in range(3):
            check(client, written)
        client.flush()
        status = made.status()
        assert "no space left on the disk of replica" in status["paused"]
        assert status["health"] == "healthy"
        assert not waits.is_answered()
        trim_half(client, written)
        waits.done()
        written[waits.offset] = waits.data
        poll("no pause", lambda: not made.status()["paused"])
        client.flush()
        for offset in range(0, waits.offset, 2 * PIECE):
            assert client.read(offset, PIECE) == bytes(PIECE)
        client.close()
        for daemon in (made.volume, *made.replicas):
            daemon.kill()
        made.start()
        client = NbdClient(made.nbd)
        poll("healthy", lambda: made.status()["health"] == "healthy")
        for _ in range(3):
            check(client, written)
        client.close()


def test_room_made_on_the_disk_itself_is_noticed(tmp_path: Path) -> None:
    source = random.Random(6)
    with on_small_disks(tmp_path, [1]) as made:
        ballast = tmp_path / "disk1" / "ballast"
        ballast.write_bytes(bytes(8 * MIB))
        written, waits = fill(made, source)
        assert waits is not None, "one full disk is enough"
        assert made.member(1)["replica_uuid"] in made.status()["paused"]
        ballast.unlink()
        waits.done()
        written[waits.offset] = waits.data
        client = NbdClient(made.nbd)
        for number in range(3):
            check(client, written)
            if number < 2:
                made.replicas[2 * number].kill()
        client.close()


def test_blocks_that_wait_on_one_member_are_not_read_there(tmp_path: Path) -> None:
    source = random.Random(10)
    with on_small_disks(tmp_path, [1]) as made:
        written, waits = fill(made, source)
        assert waits is not None
        client = NbdClient(made.nbd)
        cookies = [client.send(READ, waits.offset, 4096) for _ in range(400)]
        trim = NbdClient(made.nbd)
        trim_half(trim, written)  # room: now nothing waits any more
        sizes = dict.fromkeys(cookies, 4096)
        answers = [client.receive(sizes) for _ in cookies]
        contents = [content for _, error, content in sorted(answers) if not error]
        assert contents.count(waits.data[:4096]) == len(cookies), (
            "the other members have it already"
        )
        waits.done()
        trim.close()
        client.close()


def test_a_member_that_is_full_and_lost_holds_nothing_up(tmp_path: Path) -> None:
    source = random.Random(11)
    with on_small_disks(tmp_path, [0]) as made:
        written, waits = fill(made, source)
        assert waits is not None
        made.replicas[0].kill()
        waits.done()
        written[waits.offset] = waits.data
        assert made.member(0)["state"] == "OUT"
        client = NbdClient(made.nbd)
        check(client, written)
        for offset in list(written)[20:]:
            client.trim(offset, PIECE)
            del written[offset]
        made.replicas[0].start()
        poll("back in sync", lambda: made.member(0)["state"] == "IN_SYNC")
        for other in (1, 2):
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


def test_a_snapshot_is_refused_on_a_full_disk_and_deleting_one_makes_room(tmp_path: Path) -> None:
    source = random.Random(7)
    with on_small_disks(tmp_path, [0, 1, 2]) as made:
        client = NbdClient(made.nbd)
        for offset in range(0, 4 * MIB, PIECE):
            client.write(offset, source.randbytes(PIECE))
        made.volume.must("snapshot-create", name="old")
        written, waits = fill(made, source)
        assert waits is not None
        with no_byte_left([tmp_path / f"disk{number}" for number in range(3)]):
            answer = made.volume.ask("snapshot-create", name="one")
            assert not answer["ok"]
            assert "no space" in answer["message"]
            check(client, written)
            made.volume.must("snapshot-remove", name="old")
            waits.done()
            written[waits.offset] = waits.data
            check(client, written)
            assert made.status()["health"] == "healthy"
        made.volume.must("snapshot-create", name="two")
        export = NbdClient(made.nbd, "vol@two")
        check(export, written)
        export.close()
        client.close()


def test_a_volume_on_full_disks_opens_again_and_can_be_trimmed(tmp_path: Path) -> None:
    source = random.Random(9)
    with on_small_disks(tmp_path, [0, 1, 2]) as made:
        written, waits = fill(made, source)
        assert waits is not None
        client = NbdClient(made.nbd)
        client.flush()
        client.close()
        with no_byte_left([tmp_path / f"disk{number}" for number in range(3)]):
            for daemon in (made.volume, *made.replicas):
                daemon.kill()
            waits.client.close()
            made.start()
            client = NbdClient(made.nbd)
            check(client, written)
            trim_half(client, written)
            client.write(0, b"r" * PIECE)
            written[0] = b"r" * PIECE
            client.flush()
            check(client, written)
            client.close()


def test_a_full_disk_under_the_local_replica_makes_writes_wait(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk, source = tmp_path / "disk", random.Random(8)
    if not small_disk(disk, "ext4", 16):
        pytest.skip("this machine does not let root mount ext4")
    try:
        (disk / "replica").mkdir()
        (tmp_path / "replica0").symlink_to(disk / "replica")
        with cluster(tmp_path, replicas=1, size="64M", local=True) as made:
            written, waits = fill(made, source)
            assert waits is not None
            client = NbdClient(made.nbd)
            check(client, written)
            cookie = client.send(READ, waits.offset, PIECE)
            trim = NbdClient(made.nbd)
            trim_half(trim, written)
            waits.done()
            assert client.receive({cookie: PIECE}) == (cookie, 0, waits.data)
            written[waits.offset] = waits.data
            client.flush()
            check(client, written)
            assert made.status()["health"] == "healthy"
            trim.close()
            client.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)
