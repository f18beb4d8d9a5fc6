"""Proves that a volume never has two writers, and that strangers are kept out.

A second owner either takes the volume over (the first one stops with exit code 4) or is refused;
in no case do both of them acknowledge a write.
"""

from __future__ import annotations

from pathlib import Path

from tests.blockd.daemon_harness import Cluster, Daemon, cluster, poll
from tests.blockd.nbd_client import NbdClient

BLOCK = 4096


def second(made: Cluster, state: Path, *options: str) -> Daemon:
    """Another volume daemon of the same replicas, with an NBD socket of its own."""
    daemon = made.volume_daemon(
        [made.replica_address(number) for number in range(len(made.replicas))], state, "second"
    )
    daemon.arguments[daemon.arguments.index("--nbd") + 1] = f"unix:{made.directory}/second.nbd"
    daemon.arguments += options
    return daemon


def reap(daemon: Daemon) -> None:
    if daemon.alive():
        daemon.kill()


def test_a_second_owner_takes_over_and_the_first_one_stops(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        old = NbdClient(made.nbd)
        old.write(0, b"1" * BLOCK)
        other = second(made, tmp_path / "state.db").start()
        try:
            acknowledged = True
            try:
                old.write(0, b"2" * BLOCK)
            except OSError:
                acknowledged = False
            assert not acknowledged, "the old owner acknowledged a write after it was fenced"
            assert made.volume.process is not None
            assert made.volume.process.wait(30) == 4
            lines = made.volume.log.read_text().splitlines()
            assert "Traceback" not in made.volume.log.read_text()
            assert any("epoch" in line or "owner" in line for line in lines)
            new = NbdClient(tmp_path / "second.nbd")
            for _ in range(6):
                assert new.read(0, BLOCK) == b"1" * BLOCK
            new.write(0, b"3" * BLOCK)
            assert [m["state"] for m in other.must("status")["members"]].count("IN_SYNC") >= 1
            new.close()
        finally:
            reap(other)
        old.close()


def test_a_fenced_owner_stops_by_itself_even_when_idle(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2, size="32M") as made:
        other = second(made, tmp_path / "state.db").start()
        try:
            assert made.volume.process is not None
            assert made.volume.process.wait(30) == 4
            assert other.must("status")["health"] in ("healthy", "degraded")
        finally:
            reap(other)


def test_an_owner_that_does_not_know_the_record_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"1" * BLOCK)
        code, said = second(made, tmp_path / "empty.db").refused()
        assert code in (1, 4), said
        client.write(0, b"2" * BLOCK)
        assert client.read(0, BLOCK) == b"2" * BLOCK
        poll("healthy", lambda: made.status()["health"] == "healthy")
        client.close()


def test_an_owner_with_a_record_of_the_past_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, size="32M") as made:
        assert made.volume.end() == 0
        past = tmp_path / "past.db"
        past.write_bytes((tmp_path / "state.db").read_bytes())
        for _ in range(3):
            made.volume.start()
            made.volume.must("snapshot-create", name=f"s{len(made.status()['snapshots'])}")
            assert made.volume.end() == 0
        code, said = second(made, past).refused()
        assert code in (1, 4), said
        made.volume.start()
        assert made.status()["health"] == "healthy"
        assert len(made.status()["snapshots"]) == 3


def test_a_wrong_key_keeps_a_stranger_out(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the right key")
    (tmp_path / "wrong").write_text("another key!!")
    made = Cluster(tmp_path, replicas=2, size="32M")
    for daemon in (made.volume, *made.replicas):
        daemon.arguments += ["--key-file", str(tmp_path / "key")]
    try:
        made.start()
        client = NbdClient(made.nbd)
        client.write(0, b"1" * BLOCK)
        for options in ((), ("--key-file", str(tmp_path / "wrong"))):
            code, said = second(made, tmp_path / "other.db", *options).refused()
            assert code in (1, 4), said
            assert "key" in said, said
            client.write(BLOCK, b"2" * BLOCK)
        assert made.status()["health"] == "healthy"
        client.close()
    finally:
        made.end()


def test_replicas_of_two_volumes_are_not_one_volume(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with cluster(tmp_path / "a", replicas=2, size="32M") as one:
        with cluster(tmp_path / "b", replicas=1, size="32M") as two:
            client = NbdClient(two.nbd)
            client.write(0, b"b" * BLOCK)
            client.close()
            assert two.volume.end() == 0
            assert one.volume.end() == 0
            addresses = [one.replica_address(0), two.replica_address(0)]
            for state in (tmp_path / "new.db", tmp_path / "a" / "state.db"):
                code, said = one.volume_daemon(addresses, state, "mixed").refused()
                assert code in (1, 2, 4), said
            two.volume.start()
            client = NbdClient(two.nbd)
            assert client.read(0, BLOCK) == b"b" * BLOCK
            client.close()
        one.volume.start()
        assert one.status()["health"] == "healthy"


def test_replicas_of_different_sizes_are_not_one_volume(tmp_path: Path) -> None:
    made = Cluster(tmp_path, replicas=2, size="32M")
    made.replicas[1] = made.replica_daemon(1, "64M")
    try:
        for replica in made.replicas:
            replica.start()
        code, said = made.volume.refused()
        assert code in (1, 2, 4), said
        assert not (tmp_path / "nbd.sock").exists()
    finally:
        made.end()


def test_the_same_replica_twice_is_not_two_copies(tmp_path: Path) -> None:
    made = Cluster(tmp_path, replicas=1, size="32M")
    try:
        made.replicas[0].start()
        address = made.replica_address(0)
        code, said = made.volume_daemon([address, address], tmp_path / "state.db").refused()
        assert code in (1, 2, 4), said
    finally:
        made.end()
