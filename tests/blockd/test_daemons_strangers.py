"""Proves that a directory that is not the one that took part is never taken for it.

A disk is replaced and its directory made anew with the same identity, or put back from an old copy:
the volume must not read from it what it does not have, and must not lose what others have.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from snapshots.replica import Replica
from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.nbd_client import NbdClient

BLOCK = 4096
SIZE = 32 << 20


def directory(made: Cluster, number: int) -> Path:
    return made.directory / f"replica{number}"


def make_anew(made: Cluster, number: int) -> None:
    """Another, empty directory with the same identity."""
    replica = Replica.open(directory(made, number))
    known = replica.metadata
    replica.close()
    shutil.rmtree(directory(made, number))
    Replica.create(
        directory(made, number), size_bytes=known.size_bytes, replica_uuid=known.replica_uuid
    )


def fill(made: Cluster, content: bytes) -> None:
    client = NbdClient(made.nbd)
    for block in range(0, 8192, 1024):
        client.write(block * BLOCK, content)
    client.flush()
    client.close()


def read_often(made: Cluster, content: bytes) -> None:
    """More reads than one member gets in a row."""
    client = NbdClient(made.nbd)
    for _ in range(200):
        assert client.read(0, BLOCK) == content
    client.close()


def check_each(made: Cluster, content: bytes) -> None:
    """Every member holds it, whoever is asked."""
    poll("all in sync", lambda: {m["state"] for m in made.status()["members"]} == {"IN_SYNC"})
    made.volume.end()
    for number, daemon in enumerate(made.replicas):
        daemon.end()
        replica = Replica.open(directory(made, number))
        buffer = memoryview(bytearray(BLOCK + 4))
        for block in range(0, 8192, 1024):
            replica.read_into(block, 1, buffer)
            assert buffer[4:] == content, f"replica {number} block {block}"
        replica.close()


def test_a_directory_made_anew_is_filled_as_a_whole_while_the_volume_runs(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        fill(made, b"1" * BLOCK)
        made.replicas[0].kill()
        poll("it is OUT", lambda: made.member(0)["state"] == "OUT")
        make_anew(made, 0)
        made.replicas[0].start()
        check_each(made, b"1" * BLOCK)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_directory_made_anew_is_not_in_sync_when_the_volume_opens(
    tmp_path: Path, end: signal.Signals
) -> None:
    with cluster(tmp_path, size="32M") as made:
        fill(made, b"1" * BLOCK)
        made.volume.end(end)
        made.replicas[0].end()
        make_anew(made, 0)
        made.replicas[0].start()
        made.volume.start()
        read_often(made, b"1" * BLOCK)
        check_each(made, b"1" * BLOCK)


def with_an_old_copy(made: Cluster) -> Path:
    """Fill the volume with 1, keep a copy of a directory, go on with 2; where the copy is."""
    fill(made, b"1" * BLOCK)
    made.volume.end()
    made.replicas[0].end()
    copy = made.directory / "copy"
    shutil.copytree(directory(made, 0), copy)
    made.replicas[0].start()
    made.volume.start()
    fill(made, b"2" * BLOCK)  # stable: no zone remembers it as missing
    return copy


def put_back(made: Cluster, copy: Path) -> None:
    shutil.rmtree(directory(made, 0))
    copy.rename(directory(made, 0))
    made.replicas[0].start()


def test_an_old_copy_is_not_in_sync_when_the_volume_opens(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        copy = with_an_old_copy(made)
        made.volume.end()
        made.replicas[0].end()
        put_back(made, copy)
        made.volume.start()
        read_often(made, b"2" * BLOCK)
        check_each(made, b"2" * BLOCK)


def test_an_old_copy_of_a_lost_member_is_compared_as_a_whole(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        copy = with_an_old_copy(made)
        made.replicas[0].kill()
        poll("it is OUT", lambda: made.member(0)["state"] == "OUT")
        put_back(made, copy)
        check_each(made, b"2" * BLOCK)


def test_a_volume_whose_directories_are_all_empty_is_not_served(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2, size="32M") as made:
        fill(made, b"1" * BLOCK)
        made.volume.end()
        kept = []
        for number in range(2):
            made.replicas[number].end()
            shutil.copytree(directory(made, number), tmp_path / f"kept{number}")
            kept.append(tmp_path / f"kept{number}")
            make_anew(made, number)
            made.replicas[number].start()
        code, said = made.volume.refused()
        assert code == 6
        assert "empty or old copies" in said
        for number in range(2):
            made.replicas[number].end()
            shutil.rmtree(directory(made, number))
            kept[number].rename(directory(made, number))
            made.replicas[number].start()
        made.volume.start()
        check_each(made, b"1" * BLOCK)
