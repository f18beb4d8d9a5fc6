"""Proves the nbd front end with the kernel's driver: file systems live on it, and through the death
of every process that serves it, without an I/O error. Needs root and the nbd module; on machines
without it, tests/guest/test_nbd.py runs this file in a guest."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.frontends import processes
from blockd.frontends.nbd import NbdFrontEnd
from blockd.node import control
from blockd.node.objects import Volume
from protocol.errors import ConflictError, PeerError
from tests.blockd.node_harness import MIB, PATIENCE, WAIT_SECONDS, NodeHarness, until

REASON = NbdFrontEnd().unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

STALL_SECONDS_MAX = 5.0 * PATIENCE
FILES = {f"dir{n % 7}/file{n}": os.urandom(n * 37) for n in range(300)}


def attached(node: NodeHarness, fs: str, **options: int) -> Path:
    """A new volume on an nbd device, mounted; where."""
    node.create("data", **options)
    node.attach("data", "nbd")
    view = node.operations.mount("data", None, fs, WAIT_SECONDS)
    assert view.mount
    assert view.device
    assert view.device.startswith("/dev/nbd")
    return Path(view.mount.path)


def fill(where: Path) -> None:
    for name, content in FILES.items():
        (where / name).parent.mkdir(exist_ok=True)
        (where / name).write_bytes(content)


def holds_files(where: Path) -> bool:
    return all((where / name).read_bytes() == content for name, content in FILES.items())


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def device_of(node: NodeHarness) -> str:
    device = node.view("data").device
    assert device
    return device


def allocated(node: NodeHarness) -> list[int]:
    return [
        sum(path.stat().st_blocks * 512 for path in Path(item.path).rglob("*") if path.is_file())
        for item in node.view("data").replicas
    ]


def written(where: Path) -> int:
    """How many writes the device below a mount point has completed."""
    device = next(entry.source for entry in processes.mounts() if entry.path == str(where))
    return int((Path("/sys/block") / Path(device).name / "stat").read_text().split()[4])


@contextlib.contextmanager
def busy(where: Path, seconds: int) -> Iterator[list[float]]:
    """fio writes, flushes, reads back and verifies meanwhile; its longest stall in seconds."""
    words = ["fio", "--name=busy", f"--directory={where}", "--rw=randrw", "--bs=4k", "--size=24M"]
    words += ["--ioengine=psync", "--fsync=8", "--verify=crc32c", "--verify_fatal=1"]
    words += ["--time_based", f"--runtime={seconds}", "--output-format=json", "--fallocate=none"]
    stalls: list[float] = []
    subprocess.run([*words, "--create_only=1"], check=True, stdout=subprocess.DEVNULL)
    before = written(where)
    fio = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(lambda: written(where) > before + 100, "fio is at work")
        yield stalls
        assert fio.stdout
        said = fio.stdout.read().decode()
        assert fio.wait() == 0, said
    except BaseException:
        fio.kill()  # it ends when the device is served again, which is not for us to wait for
        processes.collect(fio)
        raise
    job = json.loads(said[said.index("{") :])["jobs"][0]
    assert job["error"] == 0
    stalls += [job[way]["clat_ns"]["max"] / 1e9 for way in ("read", "write")]
    stalls.append(job["sync"]["lat_ns"]["max"] / 1e9)


def check_after(where: Path, stalls: list[float], what: str) -> None:
    """No error, no read-only remount, no long stall."""
    longest = max(stalls)
    print(f"STALL after {what}: {longest:.2f} s", file=sys.__stderr__)
    options = [line for line in Path("/proc/mounts").read_text().splitlines() if str(where) in line]
    assert len(options) == 1
    assert " rw," in options[0]
    assert holds_files(where)
    assert longest < STALL_SECONDS_MAX


def kill_daemon(node: NodeHarness) -> None:
    """kill -9 of the volume daemon, and until the next one has the device."""
    before = node.view("data").pid
    assert before
    os.kill(before, signal.SIGKILL)
    until(lambda: node.view("data").pid not in (None, before), "the next volume daemon")
    until(lambda: connections(node) == 1, "the kernel is connected to it")


def connections(node: NodeHarness) -> int:
    context = node.service.context
    volume = context.store.get(Volume, "data")
    with contextlib.suppress(PeerError):
        return context.served_target(volume, volume.status.epoch).device_connections
    return 0


@pytest.mark.parametrize(
    ("fs", "block_size", "size_bytes"), [("ext4", 4096, 64 * MIB), ("xfs", 512, 320 * MIB)]
)
def test_a_file_system_lives_on_it_and_grows(
    node: NodeHarness, fs: str, block_size: int, size_bytes: int
) -> None:
    where = attached(node, fs, replicas=2, block_size=block_size, size_bytes=size_bytes)
    device = device_of(node)
    queue = Path("/sys/block") / Path(device).name / "queue"
    assert int((queue / "logical_block_size").read_text()) == block_size
    assert (queue / "write_cache").read_text() == "write back\n"
    assert os.readlink("/dev/blockd/data") == device
    fill(where)
    before = shutil.disk_usage(where).total
    node.operations.resize("data", 2 * size_bytes, WAIT_SECONDS)
    assert int(run("blockdev", "--getsize64", device)) == 2 * size_bytes
    run(*(["resize2fs", device] if fs == "ext4" else ["xfs_growfs", str(where)]))
    assert shutil.disk_usage(where).total > 1.7 * before
    node.operations.unmount("data", WAIT_SECONDS)
    node.operations.detach("data", WAIT_SECONDS)
    assert not Path("/dev/blockd/data").is_symlink()
    assert not (queue.parent / "pid").exists()
    node.attach("data", "nbd")
    node.operations.mount("data", None, fs, WAIT_SECONDS)
    assert holds_files(where)


def test_fstrim_gives_space_back_on_every_replica(node: NodeHarness) -> None:
    where = attached(node, "ext4", replicas=2, size_bytes=128 * MIB)
    (where / "big").write_bytes(os.urandom(40 * MIB))
    os.sync()
    full = allocated(node)
    assert min(full) > 40 * MIB
    (where / "big").unlink()
    os.sync()
    run("fstrim", str(where))
    assert all(
        after < before - 35 * MIB for before, after in zip(full, allocated(node), strict=True)
    )


def test_the_death_of_the_volume_daemon_is_a_pause(node: NodeHarness) -> None:
    where = attached(node, "ext4", replicas=2, size_bytes=128 * MIB)
    fill(where)
    with busy(where, int(8 * PATIENCE)) as stalls:
        for _ in range(3):
            kill_daemon(node)
    check_after(where, stalls, "kill -9 of the volume daemon")
    until(lambda: node.view("data").health == "healthy", "healthy")


def test_the_death_of_a_replica_is_hardly_seen(node: NodeHarness) -> None:
    where = attached(node, "xfs", replicas=3, size_bytes=320 * MIB)
    fill(where)
    with busy(where, int(6 * PATIENCE)) as stalls:
        victim = node.view("data").replicas[0].pid
        assert victim
        os.kill(victim, signal.SIGKILL)
    check_after(where, stalls, "kill -9 of a replica")
    node.until_healthy("data", 3)


@contextlib.contextmanager
def service(home: Path) -> Iterator[int]:
    """`blockd serve` as a process; its pid."""
    words = [sys.executable, "-m", "blockd", "--home", str(home), "serve"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: (home / "blockd.sock").exists(), "the node service is ready")
            yield process.pid
        finally:
            process.kill()
    (home / "blockd.sock").unlink(missing_ok=True)


def test_node_service_and_volume_daemon_die_together(node: NodeHarness) -> None:
    where = attached(node, "ext4", replicas=2, size_bytes=128 * MIB)
    fill(where)
    context, volume = node.service.context, node.service.context.store.get(Volume, "data")
    place = context.volume_daemon(volume, []).control
    listening = f"unix:{context.target(volume, 0).device_socket}"

    def serves_the_device() -> int | None:
        with contextlib.suppress(PeerError):
            answer = control.status(place)
            return answer["pid"] if answer["clients"][listening].get("data") else None
        return None

    node.service.close()
    try:
        # What serves the device must do so to the end: fio could not end otherwise.
        with contextlib.ExitStack() as next_service, service(node.root) as first:
            with busy(where, int(20 * PATIENCE)) as stalls:
                os.kill(first, signal.SIGKILL)
                before = serves_the_device()
                assert before
                os.kill(before, signal.SIGKILL)
                assert processes.wait_for_end(first, WAIT_SECONDS)
                (node.root / "blockd.sock").unlink()
                began = time.monotonic()
                next_service.enter_context(service(node.root))
                until(lambda: serves_the_device() not in (None, before), "the device is served")
                away = time.monotonic() - began
            assert holds_files(where)
        print(f"STALL of both: {max(stalls):.2f} s, service away {away:.2f} s", file=sys.__stderr__)
        assert max(stalls) < away + STALL_SECONDS_MAX
    finally:
        node.service = node._started()
    until(lambda: node.view("data").state == "attached", "attached")
    assert node.view("data").mount


def test_a_request_that_is_held_for_long_is_not_given_up(node: NodeHarness) -> None:
    """While the volume daemon stands still, so does I/O; nothing is sent twice or fails."""
    where = attached(node, "ext4", size_bytes=64 * MIB)
    pid = node.view("data").pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    words = ["dd", "if=/dev/zero", f"of={where}/held", "bs=4k", "count=1", "oflag=direct,sync"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as writer:
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(4.0)  # several rounds of the request timer
        os.kill(pid, signal.SIGCONT)
        assert writer.wait(WAIT_SECONDS) == 0
    assert node.view("data").pid == pid
    assert connections(node) == 1


def test_what_is_in_use_is_not_taken_away(node: NodeHarness) -> None:
    attached(node, "ext4", size_bytes=64 * MIB)
    device = device_of(node)
    with pytest.raises(ConflictError, match="blockd volume umount data"):
        node.operations.detach("data", WAIT_SECONDS)
    node.operations.unmount("data", WAIT_SECONDS)
    other = node.root / "elsewhere"
    other.mkdir()
    run("mount", device, str(other))
    with pytest.raises(ConflictError, match=f"{device}.*is mounted at {other}"):
        node.operations.detach("data", WAIT_SECONDS)
    run("umount", str(other))
    with open(device, "rb") as held, subprocess.Popen(["sleep", "600"], stdin=held) as user:
        held.close()
        with pytest.raises(ConflictError, match=f"pid {user.pid}"):
            node.operations.detach("data", WAIT_SECONDS)
        user.kill()
    until(lambda: node.view("data").state == "attached", "the refused detach is undone")
    node.operations.detach("data", WAIT_SECONDS)


def test_a_snapshot_is_a_read_only_device_beside_the_volume(
    node: NodeHarness, tmp_path: Path
) -> None:
    where = attached(node, "ext4", replicas=2, size_bytes=64 * MIB)
    fill(where)
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    shutil.rmtree(where / "dir1")
    view = node.operations.snapshot_attach("data", "one", "nbd", WAIT_SECONDS)
    assert view.device
    assert view.device != device_of(node)
    assert run("blockdev", "--getro", view.device) == "1\n"
    assert os.readlink("/dev/blockd/data@one") == view.device
    seen = tmp_path / "seen"
    seen.mkdir()
    run("mount", "-o", "ro,noload", view.device, str(seen))
    assert holds_files(seen)
    kill_daemon(node)
    run("sh", "-c", "echo 3 >/proc/sys/vm/drop_caches")
    assert holds_files(seen), "it, too, is connected to the next daemon"
    with pytest.raises(ConflictError, match="mounted"):
        node.operations.snapshot_detach("data", "one", WAIT_SECONDS)
    run("umount", str(seen))
    node.operations.snapshot_detach("data", "one", WAIT_SECONDS)
    assert not Path("/dev/blockd/data@one").is_symlink()


def test_blocks_of_512_bytes_partitions_and_direct_io(node: NodeHarness) -> None:
    node.create("data", block_size=512)
    node.attach("data", "nbd")
    device = device_of(node)
    subprocess.run(["sfdisk", "-q", device], input=b"2048,40960\n", check=True)
    part = Path(f"{device}p1")
    until(part.is_block_device, "the partition is seen")
    run("mkfs.ext4", "-q", str(part))
    assert "ext4" in run("blkid", "-p", str(part))
    content = mmap.mmap(-1, 512)
    content.write(b"x" * 512)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        os.pwrite(fd, content, 63 << 20)
        os.fsync(fd)
        back = mmap.mmap(-1, 512)
        os.preadv(fd, [back], 63 << 20)
        assert back[:] == content[:]
        with pytest.raises(OSError, match="Invalid argument"):
            os.preadv(fd, [back], 100)
    finally:
        os.close(fd)


def test_what_would_go_back_in_time_is_cut_off(node: NodeHarness, tmp_path: Path) -> None:
    """All replicas forget that they are of this boot: they may lack writes nobody flushed."""
    where = attached(node, "ext4", replicas=2, size_bytes=64 * MIB)
    other = tmp_path / "boot_id"
    other.write_text("11111111-2222-3333-4444-555555555555\n")
    run("mount", "--bind", str(other), "/proc/sys/kernel/random/boot_id")
    try:
        pids = [item.pid for item in node.view("data").replicas] + [node.view("data").pid]
        for pid in pids:
            assert pid
            os.kill(pid, signal.SIGKILL)

        def write_fails() -> bool:
            try:
                fd = os.open(where / "file", os.O_WRONLY | os.O_CREAT)
                try:
                    os.write(fd, b"x")
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                return error.errno in (errno.EIO, errno.EROFS)
            return False

        until(write_fails, "I/O ends with errors")
        # The mount is taken down and the volume goes on from what is on the disks.
        until(lambda: node.view("data").state == "attached" and connections(node), "a new device")
        until(lambda: node.view("data").mount is not None, "mounted again")
    finally:
        run("umount", "/proc/sys/kernel/random/boot_id")
