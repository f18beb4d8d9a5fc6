"""Proves the front ends whose devices do not outlive their daemon, fuse and nbd-client, on a real
kernel: block devices, file systems, and that nothing in use is ever taken away. Needs root, and
/dev/fuse and loop devices or the nbd driver (tests/guest/test_nbd.py runs that part in a guest)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blockd.frontends import choose, processes, tools
from blockd.frontends.fuse import FuseFrontEnd
from blockd.frontends.nbd_tool import NbdToolFrontEnd
from blockd.node import mounts
from blockd.node.views import VolumeView
from protocol.errors import ConflictError, RequestError
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, until

REASON = FuseFrontEnd().unavailable()
needs_fuse = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TOOL_REASON = NbdToolFrontEnd().unavailable()
needs_tool = pytest.mark.skipif(TOOL_REASON is not None, reason=f"nbd-client: {TOOL_REASON}")
WAYS = [pytest.param("fuse", marks=needs_fuse), pytest.param("nbd-client", marks=needs_tool)]

FILES = {f"dir{n % 7}/file{n}": os.urandom(n * 37) for n in range(120)}


@contextmanager
def held(device: str | None) -> Iterator[int]:
    """A process has a device open; its pid."""
    with (
        open(str(device), "rb") as opened,
        subprocess.Popen(["sleep", "60"], stdin=opened) as user,
    ):
        opened.close()
        try:
            yield user.pid
        finally:
            user.kill()


def _fill(where: Path) -> None:
    for name, content in FILES.items():
        path = where / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _holds_files(where: Path) -> bool:
    return all((where / name).read_bytes() == content for name, content in FILES.items())


@pytest.mark.parametrize("front_end", WAYS)
@pytest.mark.parametrize(
    ("fs", "block_size", "size_bytes"), [("ext4", 4096, 64 * MIB), ("xfs", 512, 320 * MIB)]
)
def test_a_file_system_lives_through_snapshot_revert_and_restart(
    node: NodeHarness, fs: str, block_size: int, size_bytes: int, front_end: str
) -> None:
    node.create("data", replicas=2, size_bytes=size_bytes, block_size=block_size)
    view = node.attach("data", front_end)
    assert view.device
    sector = Path(f"/sys/block/{Path(view.device).name}/queue/logical_block_size")
    assert int(sector.read_text()) == block_size
    view = node.operations.mount("data", None, fs, WAIT_SECONDS)
    assert view.mount
    where = Path(view.mount.path)
    assert [entry.fs for entry in processes.mounts() if entry.path == str(where)] == [fs]
    _fill(where)
    # Nobody asked for a sync: the snapshot must hold what was written all the same.
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    shutil.rmtree(where / "dir1")
    node.operations.revert("data", "one", True, WAIT_SECONDS)
    assert _holds_files(where)
    node.restart()
    until(lambda: node.view("data").state == "attached", "attached")
    assert node.view("data").device == view.device
    assert _holds_files(where)
    node.operations.unmount("data", WAIT_SECONDS)
    node.operations.detach("data", WAIT_SECONDS)
    node.attach("data", front_end)
    node.operations.mount("data", None, fs, WAIT_SECONDS)
    assert _holds_files(where), "a device that is not blank is mounted as it is"


@pytest.mark.parametrize("front_end", WAYS)
def test_a_trim_of_the_file_system_reaches_the_replica(node: NodeHarness, front_end: str) -> None:
    node.create("data", size_bytes=128 * MIB)
    node.attach("data", front_end)
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    big = Path(view.mount.path) / "big"
    big.write_bytes(os.urandom(40 * MIB))
    os.sync()
    full = _allocated(view.replicas[0].path)
    assert full > 40 * MIB
    big.unlink()
    os.sync()
    subprocess.run(["fstrim", view.mount.path], check=True)
    assert _allocated(view.replicas[0].path) < full - 35 * MIB


@pytest.mark.parametrize("front_end", WAYS)
def test_what_is_in_use_is_not_taken_away(node: NodeHarness, front_end: str) -> None:
    node.create("data")
    view = node.attach("data", front_end)
    assert view.device
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    with pytest.raises(ConflictError, match="unmount it first"):
        node.operations.detach("data", WAIT_SECONDS)
    with subprocess.Popen(["sleep", "60"], cwd=view.mount.path) as user:
        with pytest.raises(ConflictError, match=rf"in use by pid {user.pid} \(sleep\)"):
            node.operations.unmount("data", WAIT_SECONDS)
        user.kill()
    node.operations.unmount("data", WAIT_SECONDS)
    # Mounted elsewhere by an administrator, then held open by a process.
    other = node.root / "elsewhere"
    other.mkdir()
    subprocess.run(["mount", view.device, str(other)], check=True)
    with pytest.raises(ConflictError, match="elsewhere"):
        node.operations.detach("data", WAIT_SECONDS)
    until(lambda: node.view("data").state == "attached", "that refused detach is undone")
    subprocess.run(["umount", str(other)], check=True)
    with held(view.device) as pid, pytest.raises(ConflictError, match=f"pid {pid}"):
        node.operations.detach("data", WAIT_SECONDS)
    until(lambda: node.view("data").state == "attached", "the refused detach is undone")
    assert node.operations.detach("data", WAIT_SECONDS).state == "detached"


@needs_fuse
def test_an_unmount_by_hand_is_respected(node: NodeHarness) -> None:
    node.create("data")
    node.attach("data", "fuse")
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    subprocess.run(["umount", view.mount.path], check=True)
    until(lambda: node.view("data").mount is None, "the service has seen it")
    assert not mounts.mounted_at(view.device or "")
    assert node.operations.mount("data", None, "ext4", WAIT_SECONDS).mount == view.mount


@pytest.mark.parametrize("front_end", WAYS)
@pytest.mark.parametrize("victim", ["volume daemon", "helper"])
def test_a_device_that_lost_its_connection_is_made_anew(
    node: NodeHarness, victim: str, front_end: str
) -> None:
    node.create("data", replicas=2)
    node.attach("data", front_end)
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    where = Path(view.mount.path)
    _fill(where)
    os.sync()
    before = _helper(node)
    os.kill((view.pid if victim == "volume daemon" else before) or 0, signal.SIGKILL)
    until(
        lambda: _helper(node) not in (None, before) and node.view("data").mount == view.mount,
        "the device is made anew and mounted",
    )
    assert _holds_files(where)


def _helper(node: NodeHarness) -> int | None:
    """The process that keeps the device of the volume up."""
    device = Path(node.view("data").device or "none").name
    for path in (
        node.root / "volumes" / "data" / "nbdfuse.pid",
        Path("/sys/block") / device / "pid",
    ):
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None


@needs_fuse
def test_data_that_is_no_file_system_is_not_formatted(node: NodeHarness) -> None:
    node.create("data")
    view = node.attach("data", "fuse")
    assert view.device
    Path(view.device).write_bytes(b"precious" * 1024)
    with pytest.raises(ConflictError, match="not formatted"):
        node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert Path(view.device).read_bytes().startswith(b"precious")
    assert node.view("data").state == "attached"


@needs_fuse
def test_a_mount_point_with_files_in_it_is_refused(node: NodeHarness) -> None:
    node.create("data")
    node.attach("data", "fuse")
    (node.root / "full").mkdir()
    (node.root / "full" / "file").touch()
    with pytest.raises(ConflictError, match="not empty"):
        node.operations.mount("data", str(node.root / "full"), "ext4", WAIT_SECONDS)
    assert node.view("data").mount is None


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "path_of", lambda tool: None)
    assert tools.missing("nbdfuse", "losetup") == (
        "nbdfuse, losetup not installed; apt-get install libnbd-bin mount"
    )
    with pytest.raises(tools.ToolError, match=r"mkfs\.xfs is not installed; .* xfsprogs"):
        tools.run("mkfs.xfs", [])


def test_auto_falls_back_to_the_socket_where_fuse_cannot_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert choose("auto").name == "socket"
    with pytest.raises(Exception, match="needs root"):
        choose("fuse")
    with pytest.raises(RequestError):
        choose("floppy")


def _allocated(directory: str) -> int:
    return sum(path.stat().st_blocks * 512 for path in Path(directory).rglob("*") if path.is_file())


def _features(view: VolumeView, snapshot: str, path: Path) -> str:
    """What ext4 says of itself in a snapshot."""
    assert view.nbd_uri
    uri = view.nbd_uri.replace("/data?", f"/data@{snapshot}?")
    subprocess.run(["nbdcopy", uri, str(path)], check=True)
    shown = subprocess.run(
        ["dumpe2fs", "-h", str(path)], capture_output=True, text=True, check=True
    )
    return next(
        line for line in shown.stdout.splitlines() if line.startswith("Filesystem features")
    )


@needs_fuse
def test_a_frozen_file_system_is_whole_in_the_snapshot_and_goes_on(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data")
    view = node.attach("data", "fuse")
    with pytest.raises(ConflictError, match="not mounted by blockd"):
        node.operations.snapshot_create("data", "early", {}, WAIT_SECONDS, freeze=True)
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    where = Path(view.mount.path)
    _fill(where)
    node.operations.snapshot_create("data", "running", {}, WAIT_SECONDS)
    node.operations.snapshot_create("data", "frozen", {}, WAIT_SECONDS, freeze=True)
    (where / "after").write_bytes(b"x")  # would hang
    os.sync()
    assert "needs_recovery" in _features(view, "running", tmp_path / "a")
    assert "needs_recovery" not in _features(view, "frozen", tmp_path / "b")


@needs_fuse
@pytest.mark.parametrize("victim", ["caller", "keeper", "nobody"])
def test_a_file_system_is_thawed_whoever_is_killed(
    node: NodeHarness, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data")
    node.attach("data", "fuse")
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    where = Path(view.mount.path)
    code = (
        "import sys; from blockd.node import freeze\n"
        f"freeze.FROZEN_SECONDS_MAX = {WAIT_SECONDS}\n"
        "with freeze.frozen(sys.argv[1]):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(where)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as caller:
        assert caller.stdout
        assert caller.stdin
        assert caller.stdout.readline() == b"in\n"
        keeper = int(Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text())
        with subprocess.Popen(["touch", str(where / "new")]) as writer:
            assert writer.poll() is None
            if victim == "keeper":
                os.kill(keeper, signal.SIGKILL)
            if victim == "caller":
                caller.kill()
            else:
                caller.stdin.close()
            assert writer.wait(WAIT_SECONDS) == 0
    assert (where / "new").exists()
