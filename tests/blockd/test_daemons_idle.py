"""Proves that daemons are small after start and use no processor while nobody asks anything."""

from __future__ import annotations

import time
from pathlib import Path

from tests.blockd.daemon_harness import Daemon, cluster
from tests.blockd.nbd_client import NbdClient

RSS_KIB_MAX = 25 << 10
IDLE_SECONDS = 2.0
TICKS_MAX = 1  # of 10 ms; the clock's own rounding


def rss_kib(daemon: Daemon) -> int:
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def ticks(daemon: Daemon) -> int:
    """User and system time used so far, in ticks of 10 ms."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_daemons_start_small_and_idle_without_a_tick(tmp_path: Path) -> None:
    with cluster(tmp_path, size="1G") as made:
        daemons = [made.volume, *made.replicas]
        sizes = {daemon.log.name: rss_kib(daemon) for daemon in daemons}
        assert max(sizes.values()) <= RSS_KIB_MAX, sizes
        client = NbdClient(made.nbd)
        client.write(0, b"x" * 4096)
        client.flush()
        # A daemon may tidy up once after the last write; two quiet seconds must then follow soon.
        used: dict[str, int] = {}
        for _ in range(4):
            before = [ticks(daemon) for daemon in daemons]
            time.sleep(IDLE_SECONDS)
            after = [ticks(daemon) for daemon in daemons]
            used = {d.log.name: b - a for d, a, b in zip(daemons, before, after, strict=True)}
            if max(used.values()) <= TICKS_MAX:
                break
        assert max(used.values()) <= TICKS_MAX, used
        client.close()


def test_a_volume_daemon_with_a_local_replica_starts_small(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1, size="1G", local=True) as made:
        assert rss_kib(made.volume) <= RSS_KIB_MAX


def test_memory_does_not_grow_with_connections_that_came_and_went(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=2, size="64M") as made:

        def visit() -> None:
            for _ in range(40):
                client = NbdClient(made.nbd)
                client.write(0, b"x" * 65536)
                assert client.read(0, 65536) == b"x" * 65536
                client.close()

        visit()
        before = rss_kib(made.volume)
        for _ in range(5):
            visit()
        assert rss_kib(made.volume) - before < 8 << 10
