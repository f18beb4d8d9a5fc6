"""Proves that a volume is a good kernel device through ublk: file systems, deaths, detaching.

Needs root and a kernel with ublk_drv; the device is served by real daemons of a node service.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.frontends.ublk import UblkFrontEnd
from blockd.kernel import ublk
from blockd.node.objects import Volume
from protocol.errors import ConflictError
from tests.blockd.node_harness import PATIENCE
from tests.blockd.ublk_ground import (
    MIB,
    NodeHarness,
    Probe,
    allocated_bytes,
    daemon_pid,
    run,
    until,
    wait_for_a_spare,
    wait_for_another_daemon,
)

REASON = UblkFrontEnd().unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no ublk here: {REASON}")

STALL_SECONDS_MAX = 2.0 * PATIENCE
FILES = ("encodings", "email", "asyncio", "importlib", "multiprocessing", "json", "http")


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory on a disk; /tmp may be memory."""
    path = Path(tempfile.mkdtemp(prefix="ublk-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def node(base: Path) -> Iterator[NodeHarness]:
    made = NodeHarness(base / "home")
    yield made
    made.close()
    assert ublk.device_ids() == [], "a device was left behind"


@contextlib.contextmanager
def mounted(device: str, base: Path, *options: str) -> Iterator[Path]:
    path = base / "mnt"
    path.mkdir(exist_ok=True)
    run("mount", *options, device, str(path))
    try:
        yield path
    finally:
        run("umount", str(path))


def attached(node: NodeHarness, *, replicas: int = 1, size: int = 256 * MIB) -> str:
    node.create("demo", replicas=replicas, size_bytes=size)
    device = node.attach("demo", "ublk").device
    assert device is not None
    return device


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_files_are_the_same_after_a_remount_and_after_an_attach(
    node: NodeHarness, base: Path, fs: str
) -> None:
    device = attached(node, replicas=2, size=400 * MIB)
    if fs == "xfs" and (shutil.which("mkfs.xfs") is None or "xfs" not in _file_systems()):
        pytest.skip("no xfs here: mkfs.xfs or the kernel module is missing")
    run(f"mkfs.{fs}", "-q", device)
    library = os.path.dirname(os.__file__)
    sources = [os.path.join(library, name) for name in FILES]
    with mounted(device, base) as path:
        for source in sources:
            run("cp", "-r", source, str(path))
    for again in ("remount", "attach"):
        if again == "attach":
            node.operations.detach("demo", 60)
            assert not os.path.exists(device)
            device = node.attach("demo", "ublk").device or ""
        with mounted(device, base) as path:
            copied = sum(1 for each in path.rglob("*") if each.is_file())
            assert copied > 200
            for source in sources:
                run("diff", "-r", source, str(path / os.path.basename(source)))
    check = ["fsck.ext4", "-fn"] if fs == "ext4" else ["xfs_repair", "-n"]
    run(*check, device)


def _file_systems() -> str:
    subprocess.run(["modprobe", "xfs"], capture_output=True, check=False)
    return Path("/proc/filesystems").read_text()


def test_what_fio_writes_at_random_is_what_it_reads(node: NodeHarness) -> None:
    device = attached(node, replicas=2)
    common = [f"--filename={device}", "--direct=1", "--ioengine=libaio", "--iodepth=32"]
    common += ["--name=x", "--size=16M", "--bsrange=4k-768k", "--verify=crc32c", "--randseed=7"]
    run("fio", *common, "--rw=randrw", "--fsync=64", "--verify_fatal=1")


def test_a_trim_gives_the_space_back_on_every_replica(node: NodeHarness, base: Path) -> None:
    device = attached(node, replicas=2)
    run("mkfs.ext4", "-q", "-E", "nodiscard", device)
    with mounted(device, base) as path:
        (path / "large").write_bytes(os.urandom(MIB) * 48)
        os.sync()
        full = allocated_bytes(base / "home")
        (path / "large").unlink()
        os.sync()
        run("fstrim", str(path))
        until(
            lambda: allocated_bytes(base / "home") < full - 2 * 40 * MIB,
            "both replicas gave back what was trimmed",
        )


def test_killing_the_volume_daemon_costs_a_pause_and_no_error(node: NodeHarness) -> None:
    device = attached(node, replicas=2)
    probes = [Probe(device, 0), Probe(device, 64 * MIB)]
    fio = subprocess.Popen(
        [
            *("fio", "--name=x", f"--filename={device}", "--offset=128M", "--size=16M", "--bs=4k"),
            *("--direct=1", "--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--loops=100"),
            *("--verify=crc32c", "--verify_fatal=1", "--time_based", "--runtime=25"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pid = daemon_pid(node)
    for _ in range(3):
        assert pid is not None
        for probe in probes:
            probe.wait_for_progress()
        wait_for_a_spare(node)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        pid = wait_for_another_daemon(node, pid, state="")
        there = time.monotonic() - killed_at
        for probe in probes:
            probe.wait_for_progress()
        print(f"next daemon after {there:.2f} s, I/O after {time.monotonic() - killed_at:.2f} s")
    said = fio.communicate()[0]
    assert fio.returncode == 0, said
    longest = max(probe.end()[1] for probe in probes)
    print(f"longest pause {longest:.2f} s")
    assert longest < STALL_SECONDS_MAX


def test_a_device_waits_while_nobody_serves_it_and_a_new_node_service_finds_it(
    node: NodeHarness,
) -> None:
    device = attached(node, replicas=2)
    probe = Probe(device)
    pid = daemon_pid(node)
    assert pid is not None
    node.service.close()  # whoever would start the next volume daemon
    os.kill(pid, signal.SIGKILL)
    with ublk.Control() as driver:
        until(lambda: driver.info(0).state == ublk.QUIESCED, "the device waits")
    node.start()
    wait_for_another_daemon(node, pid)
    rounds, _ = probe.end()
    assert rounds
    assert node.view("demo").device == device


def test_a_clean_stop_of_the_volume_daemon_leaves_the_device_to_the_next_one(
    node: NodeHarness,
) -> None:
    device = attached(node, replicas=2)
    probe = Probe(device)
    pid = daemon_pid(node)
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    wait_for_another_daemon(node, pid)
    assert probe.end()[0]


def test_a_successor_takes_the_device_over(node: NodeHarness) -> None:
    device = attached(node, replicas=2)
    probe = Probe(device)
    pid = daemon_pid(node)
    assert pid is not None
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    log = open(node.root / "successor.log", "wb")  # noqa: SIM115 - it is the daemon's for life
    subprocess.Popen(
        [*map(os.fsdecode, words), "--take-over"], stdout=log, stderr=log, start_new_session=True
    )
    wait_for_another_daemon(node, pid)
    _, longest = probe.end()
    print(f"longest pause of a hand-over {longest:.2f} s")
    assert longest < STALL_SECONDS_MAX


def test_killing_a_replica_is_not_noticed(node: NodeHarness) -> None:
    device = attached(node, replicas=3)
    probe = Probe(device)
    victim = node.view("demo").replicas[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    node.until_healthy("demo", 3)
    assert probe.end()[0]


def test_what_is_in_use_is_not_detached(node: NodeHarness, base: Path) -> None:
    device = attached(node)
    run("mkfs.ext4", "-q", device)
    with (
        mounted(device, base) as path,
        pytest.raises(ConflictError, match=f"mounted at {path}"),
    ):
        node.operations.detach("demo", 60)
    with open(device, "rb") as file:
        holder = subprocess.Popen(["sleep", "100"], stdin=file)
    with pytest.raises(ConflictError, match=rf"open in pid {holder.pid}"):
        node.operations.detach("demo", 60)
    holder.kill()
    holder.wait()
    node.operations.detach("demo", 60)


def test_a_snapshot_is_a_read_only_device(node: NodeHarness, base: Path) -> None:
    device = attached(node, replicas=2)
    run("mkfs.ext4", "-q", device)
    with mounted(device, base) as path:
        (path / "file").write_text("before")
    node.operations.snapshot_create("demo", "s1", {}, 60)
    with mounted(device, base) as path:
        (path / "file").write_text("after")
    view = node.operations.snapshot_attach("demo", "s1", "ublk", 60)
    assert view.device is not None
    assert view.device != device
    with mounted(view.device, base, "-o", "ro,noload") as path:
        assert (path / "file").read_text() == "before"
    assert run("blockdev", "--getro", view.device).strip() == "1"
    fd = os.open(view.device, os.O_RDWR)
    with pytest.raises(PermissionError):  # EPERM: the kernel knows that it is read-only
        os.pwrite(fd, b"x" * 4096, 0)
    os.close(fd)
    pid = daemon_pid(node)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for_another_daemon(node, pid)
    with mounted(view.device, base, "-o", "ro,noload") as path:
        assert (path / "file").read_text() == "before"
    node.operations.snapshot_detach("demo", "s1", 60)
    assert not os.path.exists(view.device)


def test_blocks_of_512_bytes_with_a_partition_table(node: NodeHarness, base: Path) -> None:
    node.create("demo", replicas=2, size_bytes=128 * MIB, block_size=512)
    device = node.attach("demo", "ublk").device
    assert device is not None
    assert run("blockdev", "--getss", "--getpbsz", device).split() == ["512", "4096"]
    subprocess.run(
        ["sfdisk", "-q", device],
        input="label: gpt\nstart=2048, size=65536\n,\n",
        text=True,
        check=True,
    )
    part = f"{device}p1"
    until(lambda: os.path.exists(part), "the first partition has a device")
    run("mkfs.ext4", "-q", "-b", "1024", part)
    with mounted(part, base) as path:
        (path / "file").write_bytes(b"x" * 1000)
    run("fsck.ext4", "-fn", part)
    node.operations.detach("demo", 60)
    device = node.attach("demo", "ublk").device or ""
    until(lambda: os.path.exists(f"{device}p2"), "the partitions are found again")


def test_deleting_a_volume_ends_a_device_that_waits(node: NodeHarness) -> None:
    attached(node)
    pid = daemon_pid(node)
    assert pid is not None
    node.operations.remove("demo", True, 60)
    assert ublk.device_ids() == []


def test_the_daemons_are_protected_from_the_memory_they_free(node: NodeHarness) -> None:
    attached(node, replicas=2)
    store = node.service.context.store
    volume = store.get(Volume, "demo").status.pid
    replicas = [item.pid for item in node.view("demo").replicas]
    for pid in (volume, *replicas):
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "-1000"
        status = Path(f"/proc/{pid}/status").read_text()
        locked = next(line.split()[1] for line in status.splitlines() if "VmLck" in line)
        assert int(locked) > 8 << 10


if __name__ == "__main__":
    sys.exit(pytest.main(["-x", "-s", __file__]))
