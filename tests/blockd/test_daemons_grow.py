"""Proves that a volume grows while clients use it, and that its members follow: those that were
away, those that were killed, and those of a record that does not know of it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.units import parse_size
from tests.blockd.daemon_harness import cluster
from tests.blockd.nbd_client import WRITE, NbdClient

BLOCK = 4096
SMALL, LARGE = parse_size("64M"), parse_size("300M")


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.mark.parametrize("local", [False, True])
def test_a_connected_client_uses_the_new_part(directory: Path, local: bool) -> None:
    with cluster(directory, 1 if local else 2, "64M", local) as running:
        client = NbdClient(running.nbd)
        client.run(WRITE, SMALL - BLOCK, data=b"a" * BLOCK)
        running.volume.must("snapshot-create", name="before")
        with pytest.raises(OSError, match="failed"):
            client.run(WRITE, SMALL, data=b"b" * BLOCK)
        running.volume.must("grow", size_bytes=LARGE)
        client.run(WRITE, LARGE - BLOCK, data=b"c" * BLOCK)
        client.run(WRITE, SMALL + 100, data=b"d" * 5000)
        assert client.read(SMALL - BLOCK, 2 * BLOCK) == b"a" * BLOCK + bytes(100) + b"d" * 3996
        assert NbdClient(running.nbd).size == LARGE
        assert NbdClient(running.nbd, "vol@before").read(LARGE - BLOCK, BLOCK) == bytes(BLOCK)
        with pytest.raises(OSError, match="failed"):
            client.run(WRITE, LARGE, data=b"b" * BLOCK)
        shown = subprocess.run(
            ["nbdinfo", "--size", running.uri()], capture_output=True, text=True, check=True
        )
        assert int(shown.stdout) == LARGE
        answer = running.volume.ask("grow", size_bytes=SMALL)
        assert not answer["ok"]
        assert "cannot shrink" in answer["message"]


def test_a_member_that_was_away_grows_when_it_is_back(directory: Path) -> None:
    with cluster(directory, 3, "64M") as running:
        client = NbdClient(running.nbd)
        client.run(WRITE, 0, data=b"a" * BLOCK)
        running.replicas[2].kill()
        running.volume.must("grow", size_bytes=LARGE)
        client.run(WRITE, LARGE - BLOCK, data=b"b" * BLOCK)
        running.replicas[2].start()
        running.rebuild(2)
        for number in (0, 1):
            running.replicas[number].kill()
        assert client.read(LARGE - BLOCK, BLOCK) == b"b" * BLOCK
        assert client.read(0, BLOCK) == b"a" * BLOCK


def test_the_size_outlives_kill_9_of_everything(directory: Path) -> None:
    with cluster(directory, 2, "64M") as running:
        client = NbdClient(running.nbd)
        client.run(WRITE, 0, data=b"a" * BLOCK)
        running.volume.must("grow", size_bytes=LARGE)
        client.run(WRITE, LARGE - BLOCK, data=b"b" * BLOCK)
        for daemon in (running.volume, *running.replicas):
            daemon.kill()
        for daemon in (*running.replicas, running.volume):
            daemon.start()
        client = NbdClient(running.nbd)
        assert client.size == LARGE
        assert client.read(LARGE - BLOCK, BLOCK) == b"b" * BLOCK


def test_members_that_are_larger_than_the_volume_do_no_harm(directory: Path) -> None:
    """The volume daemon died after they had grown and before the record said so."""
    with cluster(directory, 2, "64M") as running:
        for daemon in (running.volume, *running.replicas):
            assert daemon.end() == 0
        for number in range(2):
            code = (
                "from snapshots.replica import Replica; import sys\n"
                "replica = Replica.open(sys.argv[1]); replica.grow(int(sys.argv[2]))\n"
                "replica.close()"
            )
            path = str(directory / f"replica{number}")
            subprocess.run([running.volume.command()[0], "-c", code, path, str(LARGE)], check=True)
        for daemon in (*running.replicas, running.volume):
            daemon.start()
        client = NbdClient(running.nbd)
        assert client.size == SMALL
        running.volume.must("grow", size_bytes=LARGE - BLOCK)
        client.run(WRITE, LARGE - 2 * BLOCK, data=b"b" * BLOCK)
        with pytest.raises(OSError, match="failed"):
            client.run(WRITE, LARGE - BLOCK, data=b"b" * BLOCK)
