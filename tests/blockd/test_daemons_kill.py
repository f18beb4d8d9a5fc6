"""Proves that kill -9 of any daemon, at any time, costs no acknowledged byte and no wrong answer.

A killed process loses nothing that reached the kernel, so what was acknowledged must be there; what
was still under way may be there or not, but the same way on every member and for ever.
"""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.foreign import fio, tool
from tests.blockd.nbd_client import WRITE, NbdClient

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096


def digest(made: Cluster, snapshot: str = "") -> str:
    """A hash of everything an export reads as."""
    client = NbdClient(made.nbd, f"vol@{snapshot}" if snapshot else "vol")
    found = hashlib.sha256()
    for offset in range(0, client.size, MIB):
        found.update(client.read(offset, MIB))
    client.close()
    return found.hexdigest()


def digests(made: Cluster) -> dict[str, str]:
    names = ["", *(snapshot["name"] for snapshot in made.status()["snapshots"])]
    return {name: digest(made, name) for name in names}


@contextmanager
def fio_running(made: Cluster, *options: str) -> Iterator[subprocess.Popen[str]]:
    """fio writing and verifying; at the end it must have found nothing."""
    command = fio(
        made.uri(), "--rw=randrw", "--bsrange=512-64k", "--iodepth=8", "--size=32M", *options
    )
    tool("fio", "--version")
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield job
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()


def heal(made: Cluster) -> None:
    """Rebuild every member that is OUT."""
    for number in range(len(made.replicas)):
        if made.member(number)["state"] != "IN_SYNC":
            made.rebuild(number)
    assert made.status()["health"] == "healthy"


def states(made: Cluster) -> list[str]:
    return [made.member(number)["state"] for number in range(len(made.replicas))]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_replica_killed_and_rebuilt_during_fio_can_be_the_only_source(
    tmp_path: Path, victim: int
) -> None:
    with cluster(tmp_path, size="64M") as made:
        seed = NbdClient(made.nbd)
        seed.write(40 * MIB + 512, random.Random(victim).randbytes(3 * MIB))
        made.volume.must("snapshot-create", name="before")
        with fio_running(made, "--time_based", "--runtime=4", "--verify_backlog=256") as job:
            poll("fio wrote", lambda: made.status()["counters"]["writes"] > 300)
            made.replicas[victim].kill()
            poll("degraded", lambda: made.status()["health"] == "degraded")
            poll("recorded", lambda: made.member(victim)["state"] == "OUT")
            made.volume.must("snapshot-create", name="degraded")
            during = made.status()["counters"]["writes"]
            poll("writes go on", lambda: made.status()["counters"]["writes"] > during + 100)
            made.replicas[victim].start()
            assert job.poll() is None
            made.rebuild(victim)
        assert states(made) == ["IN_SYNC"] * 3
        made.volume.must("snapshot-create", name="after")
        seed.write(50 * MIB, b"last" * 1024)
        wanted = digests(made)
        for other in range(3):
            if other != victim:
                made.replicas[other].kill()
                poll("noticed", lambda other=other: made.member(other)["state"] == "OUT")
        assert digests(made) == wanted
        assert made.member(victim)["reads"] > 0
        seed.write(3, b"still writable")
        assert seed.read(3, 14) == b"still writable"
        seed.close()


def test_a_killed_volume_daemon_keeps_what_it_acknowledged_and_members_agree(
    tmp_path: Path,
) -> None:
    source = random.Random(3)
    with cluster(tmp_path, size="64M") as made:
        for round_number in range(3):
            client = NbdClient(made.nbd)
            flushed = {source.randrange(2000): source.randbytes(BLOCK) for _ in range(100)}
            for block, data in flushed.items():
                client.write(block * BLOCK, data)
            client.flush()
            answered = {source.randrange(2000, 4000): source.randbytes(BLOCK) for _ in range(100)}
            for block, data in answered.items():
                client.write(block * BLOCK, data)
            for _ in range(200):  # never answered: the daemon dies among them
                client.send(
                    WRITE,
                    source.randrange(4000 * BLOCK, SIZE - 60000),
                    data=source.randbytes(source.randrange(1, 60000)),
                )
                if made.volume.process and round_number == 2 and source.random() < 0.01:
                    break
            made.volume.kill()
            client.close()
            made.volume.start()
            assert made.status()["health"] in ("healthy", "degraded")
            client = NbdClient(made.nbd)
            for block, data in {**flushed, **answered}.items():
                assert client.read(block * BLOCK, BLOCK) == data
            first = digest(made)
            heal(made)
            # Reads are spread over members: read often enough that every one of them is asked.
            for _ in range(6):
                assert digest(made) == first
            assert all(member["reads"] > 0 for member in made.status()["members"])
            client.close()


def test_everything_killed_at_once_comes_back_with_what_was_flushed(tmp_path: Path) -> None:
    source = random.Random(4)
    with cluster(tmp_path, size="64M") as made:
        client = NbdClient(made.nbd)
        for offset in range(0, 8 * MIB, 65536):
            client.write(offset, source.randbytes(65536))
        client.flush()
        made.volume.must("snapshot-create", name="one")
        client.trim(MIB, MIB)
        client.write(5 * MIB + 100, b"tail" * 500)
        wanted = digests(made)
        for _ in range(64):
            client.send(WRITE, 32 * MIB, data=source.randbytes(65536))
        for daemon in (made.replicas[1], made.volume, made.replicas[0], made.replicas[2]):
            assert daemon.process is not None
            daemon.process.send_signal(signal.SIGKILL)
        for daemon in [made.volume, *made.replicas]:
            daemon.kill()
        client.close()
        made.start()
        client = NbdClient(made.nbd)
        client.trim(32 * MIB, 65536)
        assert digests(made) == wanted
        heal(made)
        for _ in range(4):
            assert digests(made) == wanted
        client.close()


def test_a_clean_stop_of_everything_needs_no_rebuild(tmp_path: Path) -> None:
    with cluster(tmp_path, size="64M") as made:
        client = NbdClient(made.nbd)
        client.write(12345, b"clean" * 10000)
        made.volume.must("snapshot-create", name="one")
        client.write(MIB, b"later" * 1000)
        client.close()
        wanted, epoch = digests(made), made.status()["epoch"]
        assert made.volume.end() == 0
        for replica in made.replicas:
            assert replica.end() == 0
        made.start()
        status = made.status()
        assert status["health"] == "healthy"
        assert status["epoch"] > epoch
        assert [member["rebuild"] for member in status["members"]] == [None] * 3
        assert states(made) == ["IN_SYNC"] * 3
        assert all(replica.must("status")["clean_start"] for replica in made.replicas)
        for _ in range(4):
            assert digests(made) == wanted


def test_a_clean_stop_over_the_control_socket_is_answered_first(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"s" * BLOCK)
        for daemon in (made.volume, made.replicas[0]):
            daemon.must("stop")
            assert daemon.process is not None
            assert daemon.process.wait(30) == 0
        made.start()
        assert made.status()["health"] == "healthy"
        assert NbdClient(made.nbd).read(0, BLOCK) == b"s" * BLOCK


def test_a_replica_that_missed_writes_is_never_the_truth(tmp_path: Path) -> None:
    with cluster(tmp_path, size="64M") as made:
        client = NbdClient(made.nbd)
        for number, letter in enumerate((b"A", b"B", b"C")):
            client.write(0, letter * BLOCK)
            if number < 2:
                made.replicas[number].kill()
                poll("OUT", lambda number=number: made.member(number)["state"] == "OUT")
        made.replicas[2].kill()
        poll("faulted", lambda: made.status()["health"] == "faulted")
        assert made.member(2)["state"] == "IN_SYNC", "the last one in sync is never marked OUT"
        made.replicas[0].start()
        poll("connected", lambda: made.member(0)["connected"])
        refused = made.volume.ask("rebuild", replica_uuid=made.member(0)["replica_uuid"])
        assert not refused["ok"] or made.member(0)["state"] != "IN_SYNC"
        with pytest.raises(OSError, match="failed"):
            client.read(0, BLOCK)
        made.volume.kill()
        code, said = made.volume.refused()
        assert code in (1, 6), said
        made.replicas[2].start()
        made.volume.start()
        client.close()
        client = NbdClient(made.nbd)
        assert client.read(0, BLOCK) == b"C" * BLOCK
        made.replicas[1].start()
        heal(made)
        for _ in range(9):
            assert client.read(0, BLOCK) == b"C" * BLOCK
        client.close()


def test_the_last_replica_restarted_under_a_living_volume_goes_on(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"1" * BLOCK)
        made.replicas[0].kill()
        poll("faulted", lambda: made.status()["health"] == "faulted")
        made.replicas[0].start()
        poll("healthy", lambda: made.status()["health"] == "healthy")
        assert client.read(0, BLOCK) == b"1" * BLOCK
        client.write(BLOCK, b"2" * BLOCK)
        client.flush()
        client.close()
