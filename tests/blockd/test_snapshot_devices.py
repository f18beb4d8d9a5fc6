"""Attaching snapshots: read-only devices and NBD addresses of their own.

Proves against a fake API what the commands ask and say, and with a real node service that several
snapshots can be attached while the volume is in use or detached, that they cannot be written, that
what is in use is not taken away, and that a broken device is made anew. Devices need root,
/dev/fuse and loop devices.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from blockd.node import mounts
from blockd.node.views import SnapshotView
from protocol.errors import ConflictError, NotFoundError
from tests.blockd.cli_fake_node import Run, serving_unix
from tests.blockd.nbd_client import NbdClient
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, read, until, write
from tests.blockd.test_node_fuse import held, needs_fuse

OLD, NEW = os.urandom(MIB), os.urandom(MIB)


def two_snapshots(node: NodeHarness, tmp_path: Path) -> None:
    """Snapshots `old` and `new` of an attached volume that has changed since."""
    node.create("data", replicas=2)
    view = node.attach("data")
    write(view, OLD, tmp_path / "in")
    node.operations.snapshot_create("data", "old", {}, WAIT_SECONDS)
    write(view, NEW, tmp_path / "in")
    node.operations.snapshot_create("data", "new", {}, WAIT_SECONDS)
    write(view, bytes(MIB), tmp_path / "in")


def attach(node: NodeHarness, name: str, frontend: str) -> SnapshotView:
    return node.operations.snapshot_attach("data", name, frontend, WAIT_SECONDS)


def content(device: str | None) -> bytes:
    assert device
    with open(device, "rb", buffering=0) as file:
        return file.read(MIB)


def test_the_commands_ask_and_show_the_device(tmp_path: Path, run: Run) -> None:
    view = {"name": "one", "volume": "data", "id": 1, "device": "/dev/loop7", "nbd_uri": "nbd://x"}
    with serving_unix(tmp_path / "blockd.sock") as node:
        node.answer("POST", "/v1/volumes/data/snapshots/one/attach", view)
        code, printed, _ = run("snapshot", "attach", "data@one", "--frontend", "fuse")
        assert code == 0
        assert "DEVICE" in printed
        assert "/dev/loop7" in printed
        (asked,) = node.changes()
        assert asked.body == {"frontend": "fuse"}
        gone = {**view, "device": None, "nbd_uri": None}
        node.answer("POST", "/v1/volumes/data/snapshots/one/detach", gone)
        code, printed, _ = run("snapshot", "detach", "data@one")
        assert code == 0
        assert "DEVICE" not in printed


def test_snapshots_have_nbd_addresses_beside_the_volume(node: NodeHarness, tmp_path: Path) -> None:
    two_snapshots(node, tmp_path)
    old, new = attach(node, "old", "socket"), attach(node, "new", "socket")
    for view, expected in ((old, OLD), (new, NEW)):
        target = tmp_path / "out"
        subprocess.run(["nbdcopy", str(view.nbd_uri), str(target)], check=True)
        assert target.read_bytes()[:MIB] == expected
    assert read(node.view("data"), tmp_path / "out")[:MIB] == bytes(MIB)
    node.operations.detach("data", WAIT_SECONDS)
    subprocess.run(["nbdcopy", str(old.nbd_uri), str(tmp_path / "out")], check=True)
    with pytest.raises(ConflictError, match="detach it first"):
        node.operations.snapshot_remove("data", "old", WAIT_SECONDS)
    with pytest.raises(ConflictError, match="snapshot data@"):
        node.operations.remove("data", False, WAIT_SECONDS)
    with pytest.raises(NotFoundError):
        attach(node, "none", "socket")
    for name in ("old", "new"):
        view = node.operations.snapshot_detach("data", name, WAIT_SECONDS)
        assert (view.frontend, view.nbd_uri) == (None, None)
    until(lambda: node.view("data").pid is None, "no volume daemon is needed")
    node.operations.snapshot_remove("data", "old", WAIT_SECONDS)
    attach(node, "new", "socket")
    node.operations.remove("data", True, WAIT_SECONDS)


def test_clients_of_a_snapshot_hold_it_and_not_the_volume(
    node: NodeHarness, tmp_path: Path
) -> None:
    two_snapshots(node, tmp_path)
    old = attach(node, "old", "socket")
    client = NbdClient(Path(str(old.nbd_uri).split("socket=")[1]), "data@old")
    node.operations.detach("data", WAIT_SECONDS)
    with pytest.raises(ConflictError, match="snapshot data@old is in use by 1 NBD connection"):
        node.operations.snapshot_detach("data", "old", WAIT_SECONDS)
    assert client.read(0, MIB) == OLD
    client.close()
    node.operations.snapshot_detach("data", "old", WAIT_SECONDS)


@needs_fuse
def test_snapshots_are_read_only_devices(node: NodeHarness, tmp_path: Path) -> None:
    two_snapshots(node, tmp_path)
    old, new = attach(node, "old", "fuse"), attach(node, "new", "fuse")
    assert old.device != new.device
    assert (content(old.device), content(new.device)) == (OLD, NEW)
    with pytest.raises(OSError), open(str(old.device), "wb", buffering=0) as file:  # noqa: PT011
        file.write(bytes(4096))
    assert content(old.device) == OLD
    node.restart()
    until(lambda: node.view("data").state == "attached", "attached")
    assert attach(node, "old", "auto").device == old.device
    with pytest.raises(ConflictError, match="through fuse"):
        attach(node, "old", "socket")
    with (
        held(old.device) as pid,
        pytest.raises(ConflictError, match=f"snapshot data@old.* pid {pid}"),
    ):
        node.operations.snapshot_detach("data", "old", WAIT_SECONDS)
    node.operations.snapshot_detach("data", "old", WAIT_SECONDS)
    assert content(new.device) == NEW
    node.operations.snapshot_detach("data", "new", WAIT_SECONDS)
    assert not (node.root / "volumes" / "data" / "snapshots" / "new").exists()


@needs_fuse
def test_a_file_system_in_a_snapshot_is_mounted_beside_the_volumes(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    node.attach("data", "fuse")
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    (Path(view.mount.path) / "file").write_text("then")
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    (Path(view.mount.path) / "file").write_text("now")
    device = str(attach(node, "one", "fuse").device)
    where = node.root / "one"
    where.mkdir()
    subprocess.run(["mount", "-o", "ro,noload", device, str(where)], check=True)
    try:
        assert (where / "file").read_text() == "then"
        with pytest.raises(ConflictError, match=f"umount {where}"):
            node.operations.snapshot_detach("data", "one", WAIT_SECONDS)
        until(lambda: node.operations.snapshot("data", "one").device == device, "it stays")
    finally:
        subprocess.run(["umount", str(where)], check=True)
    node.operations.snapshot_detach("data", "one", WAIT_SECONDS)
    assert not mounts.mounted_at(device)


@needs_fuse
@pytest.mark.parametrize("victim", ["volume daemon", "nbdfuse"])
def test_a_device_that_lost_its_connection_is_made_anew(
    victim: str, node: NodeHarness, tmp_path: Path
) -> None:
    two_snapshots(node, tmp_path)
    attach(node, "old", "fuse")
    pid_file = node.root / "volumes" / "data" / "snapshots" / "old" / "nbdfuse.pid"
    before = pid_file.read_text()
    pid = node.view("data").pid if victim == "volume daemon" else int(before)
    os.kill(pid or 0, signal.SIGKILL)
    until(lambda: pid_file.exists() and pid_file.read_text() not in ("", before), "a new nbdfuse")
    until(lambda: node.operations.snapshot("data", "old").device, "a new device")
    assert content(node.operations.snapshot("data", "old").device) == OLD


def test_an_attached_volume_is_reverted_unless_it_has_clients(
    node: NodeHarness, tmp_path: Path
) -> None:
    two_snapshots(node, tmp_path)
    view = node.view("data")
    assert view.nbd_uri
    with NbdClient(Path(view.nbd_uri.split("socket=")[1]), "data").socket:
        with pytest.raises(ConflictError, match="NBD clients"):
            node.operations.revert("data", "old", False, WAIT_SECONDS)
        assert node.view("data").state == "attached"
    node.operations.revert("data", "old", False, WAIT_SECONDS)
    until(lambda: node.view("data").state == "attached", "attached again")
    assert read(node.view("data"), tmp_path / "out")[:MIB] == OLD


@needs_fuse
def test_a_mounted_volume_is_reverted_by_force_only(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    node.attach("data", "fuse")
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    file = Path(view.mount.path) / "file"
    file.write_text("then")
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    file.write_text("now")
    with pytest.raises(ConflictError, match="--force-unmount"):
        node.operations.revert("data", "one", False, WAIT_SECONDS)
    assert file.read_text() == "now"
    node.operations.revert("data", "one", True, WAIT_SECONDS)
    assert file.read_text() == "then"
    node.operations.unmount("data", WAIT_SECONDS)
    device = node.view("data").device
    with held(device) as pid, pytest.raises(ConflictError, match=f"pid {pid}"):
        node.operations.revert("data", "one", False, WAIT_SECONDS)
    node.operations.revert("data", "one", False, WAIT_SECONDS)
    assert node.operations.mount("data", None, "ext4", WAIT_SECONDS).mount
    assert file.read_text() == "then"
