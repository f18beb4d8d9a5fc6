"""Proves that a replica inside the volume daemon (`--replica dir:PATH`) is as good as one outside.

The foreign clients of the other files run here against one process that is the whole data path.
"""

from __future__ import annotations

from pathlib import Path

from tests.blockd.daemon_harness import Cluster, cluster, poll
from tests.blockd.foreign import fio, qemu_io, tool
from tests.blockd.nbd_client import FUA, WRITE, NbdClient
from tests.blockd.test_daemons_clients import image

BLOCK = 4096
MIB = 1 << 20


def test_foreign_clients_get_what_they_wrote(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M", local=True) as made:
        source, back = image(tmp_path / "source", 31), tmp_path / "back"
        tool("nbdcopy", "--flush", str(source), made.uri())
        tool("nbdcopy", "--connections=4", made.uri(), str(back))
        assert back.read_bytes() == source.read_bytes()
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), made.uri())
        made.volume.must("snapshot-create", name="before")
        qemu_io(made.uri(), "write -P 7 1 3", "read -P 7 1 3", "discard 1M 1M", "read -P 0 1M 1M")
        tool(*fio(made.uri(), "--rw=randrw", "--bsrange=512-128k", "--iodepth=16", "--size=32M"))
        compared = ("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source))
        tool(*compared, made.uri("before"))
        tool(*compared, made.uri(), expect=1)


def test_kill_9_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M", local=True) as made:
        for round_number in range(3):
            client = NbdClient(made.nbd)
            for block in range(200):
                client.write(block * BLOCK, bytes([round_number * 50 + block % 50]) * BLOCK)
            client.write(300 * BLOCK + 512, b"f" * 512, FUA)
            for block in range(1000, 1100):
                client.send(WRITE, block * BLOCK, data=b"?" * BLOCK)
            made.volume.kill()
            client.close()
            made.volume.start()
            assert made.status()["health"] == "healthy"
            client = NbdClient(made.nbd)
            for block in range(200):
                wanted = bytes([round_number * 50 + block % 50]) * BLOCK
                assert client.read(block * BLOCK, BLOCK) == wanted
            assert client.read(300 * BLOCK, 1536) == bytes(512) + b"f" * 512 + bytes(512)
            for block in range(1000, 1100):
                assert client.read(block * BLOCK, BLOCK) in (bytes(BLOCK), b"?" * BLOCK)
            client.close()


def test_a_local_replica_can_move_out_and_back_in(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M", local=True) as made:
        client = NbdClient(made.nbd)
        client.write(0, b"i" * BLOCK)
        client.close()
        assert made.volume.end() == 0
        made.replicas[0].start()
        outside = made.volume_daemon([f"unix:{tmp_path}/r0.sock"], tmp_path / "state.db")
        outside.start()
        client = NbdClient(made.nbd)
        assert client.read(0, BLOCK) == b"i" * BLOCK
        client.write(0, b"o" * BLOCK)
        client.close()
        assert outside.end() == 0
        assert made.replicas[0].end() == 0
        made.volume.start()
        client = NbdClient(made.nbd)
        assert client.read(0, BLOCK) == b"o" * BLOCK
        client.close()


def test_a_record_that_does_not_know_a_local_replica_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="64M", local=True) as made:
        assert made.volume.end() == 0
        remote = made.replica_daemon(1, "64M").start()
        try:
            addresses = [f"dir:{tmp_path}/replica0", f"unix:{tmp_path}/r1.sock"]
            code, said = made.volume_daemon(addresses, tmp_path / "mixed.db").refused()
            assert code == 4, said
        finally:
            remote.end()
        made.volume.start()
        assert made.status()["health"] == "healthy"


def test_a_local_and_a_remote_replica_work_together(tmp_path: Path) -> None:
    made = Cluster(tmp_path, replicas=2, size="64M")
    addresses = [f"dir:{tmp_path}/replica0", f"unix:{tmp_path}/r1.sock"]
    made.volume = made.volume_daemon(addresses, tmp_path / "mixed.db")
    try:
        made.replicas[0].start()
        made.replicas[0].end()
        made.replicas[1].start()
        made.volume.start()
        client = NbdClient(made.nbd)
        client.write(18 * MIB + 100, b"both" * 5000)
        tool(*fio(made.uri(), "--rw=randwrite", "--bsrange=512-64k", "--iodepth=8", "--size=16M"))
        made.replicas[1].kill()
        poll("degraded", lambda: made.status()["health"] == "degraded")
        client.write(20 * MIB, b"alone" * 5000)
        made.replicas[1].start()
        remote = next(m for m in made.status()["members"] if m["address"] == addresses[1])

        def connected() -> bool:
            members = {m["replica_uuid"]: m for m in made.status()["members"]}
            return bool(members[remote["replica_uuid"]]["connected"])

        poll("connected", connected)
        made.volume.must("rebuild", replica_uuid=remote["replica_uuid"])
        poll("healthy", lambda: made.status()["health"] == "healthy")
        for _ in range(4):
            assert client.read(20 * MIB, 25000) == b"alone" * 5000
            assert client.read(17 * MIB, 4096) == bytes(4096)
        client.close()
    finally:
        made.end()
