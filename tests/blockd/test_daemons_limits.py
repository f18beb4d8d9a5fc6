"""Proves that one client or one slow replica cannot take a volume down: names that are none,
answers nobody reads, a replica that stops for a moment under writes, one that was bound meanwhile.
"""

from __future__ import annotations

import os
import signal
import struct
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.daemons.handshake import Session
from blockd.loop import Loop
from protocol.errors import ConflictError
from tests.blockd.daemon_harness import Cluster, Daemon, cluster
from tests.blockd.nbd_client import READ, WRITE, NbdClient

MEMORY_MAX_BYTES = 400 << 20  # 64 MiB of answers under way, as much unsent, and what is freed late


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


def test_an_export_name_without_a_snapshot_behind_the_at_sign_is_unknown(directory: Path) -> None:
    with cluster(directory, 1, "16M") as running:
        running.volume.must("snapshot-create", name="one")
        running.volume.must("snapshot-remove", name="one")
        with pytest.raises(LookupError):
            NbdClient(running.nbd, "vol@")
        client = NbdClient(running.nbd)
        client.write(0, b"x" * 4096)
        client.close()


def test_a_client_that_reads_no_answers_does_not_fill_the_memory(directory: Path) -> None:
    with cluster(directory, 1, "16M") as running:
        client = NbdClient(running.nbd)
        client.write(0, os.urandom(2 << 20))
        sizes = dict.fromkeys(range(1, 1501), 1 << 20)
        client.socket.sendall(  # in one go: many small ones would fill the socket's own queue
            b"".join(struct.pack(">IHHQQI", 0x25609513, 0, READ, n, 0, 1 << 20) for n in sizes)
        )
        other = NbdClient(running.nbd)
        other.write(4 << 20, b"y" * 4096)
        assert other.read(4 << 20, 4096) == b"y" * 4096
        assert running.status()["rss_bytes"] < MEMORY_MAX_BYTES
        for _ in range(1500):  # and all of them are answered once it reads
            _, error, data = client.receive(sizes)
            assert (error, len(data)) == (0, 1 << 20)
        client.close()
        other.close()


@pytest.mark.parametrize("replicas", [1, 2])
def test_writes_go_on_after_a_replica_stopped_for_a_moment(directory: Path, replicas: int) -> None:
    with cluster(directory, replicas, "128M") as running:
        client = NbdClient(running.nbd)
        data = os.urandom(1 << 20)
        stopped = running.replicas[0].pid
        for _ in range(3):
            os.kill(stopped, signal.SIGSTOP)
            client.socket.setblocking(False)
            sent = 0
            try:
                for number in range(60):  # more than the congestion limit of a member
                    client.send(WRITE, number << 20, data=data)
                    sent += 1
            except BlockingIOError:
                pass
            finally:
                os.kill(stopped, signal.SIGCONT)
                client.socket.setblocking(True)
                client.socket.settimeout(30)
            client.close()  # in the middle of a request, perhaps
            client = NbdClient(running.nbd)
            client.write(0, data)
            client.flush()
            assert client.read(0, 1 << 20) == data
        client.close()


def test_a_blank_replica_that_was_taken_meanwhile_refuses_the_other_volume(directory: Path) -> None:
    replica = Daemon(
        "r",
        [
            "replica",
            f"{directory}/r",
            "--listen",
            f"unix:{directory}/r.sock",
            "--create",
            "--size",
            "16M",
        ],
        directory,
    ).start()
    try:
        content = {"epoch": 1, "volume_name": "v", "config_seq": 0, "config": {}}
        first, second = str(uuid.uuid4()), str(uuid.uuid4())
        loop, address = Loop(), f"unix:{directory}/r.sock"
        sessions = [Session(loop, address, name, b"") for name in (first, second)]
        sessions[0].fence({**content, "volume_uuid": first})
        with pytest.raises(ConflictError, match="belongs to volume"):
            sessions[1].fence({**content, "volume_uuid": second})
        sessions[0].socket.close()
    finally:
        replica.end()


def test_a_volume_is_served_while_members_that_are_nowhere_are_reconnected(directory: Path) -> None:
    running = Cluster(directory, 2, "16M").start()
    try:
        for number in range(5):
            running.volume.must(
                "member-add", replica_uuid=f"nowhere{number}", address="tcp:127.0.0.1:1"
            )
        client = NbdClient(running.nbd)
        running.replicas[1].kill()
        client.write(0, b"z" * 4096)
        assert client.read(0, 4096) == b"z" * 4096
        client.close()
    finally:
        running.end()
