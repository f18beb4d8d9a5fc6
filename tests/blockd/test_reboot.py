"""Proves that volumes come back after a reboot as they were: attached, mounted at the same place,
with their data; and that nothing is concluded from what the reboot has ended. The machine is made
of namespaces (machine.py), all processes are real. Needs root, FUSE and loop devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.frontends import tools
from blockd.frontends.fuse import FuseFrontEnd
from blockd.node import boot
from blockd.node.objects import (
    Metadata,
    Mount,
    Node,
    NodeStatus,
    Problem,
    Replica,
    ReplicaSpec,
    ReplicaStatus,
    Snapshot,
    SnapshotSpec,
    SnapshotStatus,
    Volume,
    VolumeSpec,
    VolumeStatus,
)
from blockd.node.sqlite_store import SqliteStore
from blockd.node.store import modify_status
from tests.blockd.machine import Machine, reason_against
from tests.blockd.node_harness import until

REASON = (
    FuseFrontEnd().unavailable()
    or tools.missing("mount", "umount", "blkid", "mkfs.ext4")
    or reason_against()
)
needs_machine = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CONTENT = os.urandom(3_000_000)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine in its first boot."""
    made = Machine(tmp_path)
    try:
        made.boot()
        yield made
    finally:
        made.cut_power()


def _mounted_volume(machine: Machine, name: str, replicas: int = 2) -> str:
    """A volume with a file that was synced; where it is mounted."""
    machine.blockd("volume", "create", name, "--size", "64M", "--replicas", str(replicas))
    machine.blockd("volume", "attach", name, "--frontend", "fuse")
    where = str(machine.blockd("volume", "mount", name)["mount"]["path"])
    machine.inside(f"{where}/file").write_bytes(CONTENT)
    machine.run("sync", "--file-system", where)
    return where


def _is_back(machine: Machine, name: str, where: str) -> bool:
    view = machine.view(name)
    if view["state"] != "attached" or not view["mount"]:
        return False
    return machine.mounts().get(where) == view["device"]


@needs_machine
@pytest.mark.parametrize("end", ["power cut", "shutdown"])
def test_a_mounted_volume_is_mounted_again_with_its_data(machine: Machine, end: str) -> None:
    where = _mounted_volume(machine, "data", replicas=3)
    local = _mounted_volume(machine, "local", replicas=1)
    machine.blockd("snapshot", "create", "data@one")
    machine.blockd("snapshot", "attach", "data@one", "--frontend", "fuse")
    machine.blockd("volume", "create", "other", "--size", "64M", "--replicas", "1")
    if end == "shutdown":
        machine.shut_down()
    else:
        machine.cut_power()
    machine.boot()
    for name, path in (("data", where), ("local", local)):
        until(lambda name=name, path=path: _is_back(machine, name, path), machine.log())  # type: ignore[misc]
        assert machine.inside(f"{path}/file").read_bytes() == CONTENT
    until(lambda: machine.view("data")["health"] == "healthy", "the members are in sync again")
    until(lambda: machine.view("data")["snapshots"][0]["device"], "the snapshot is attached")
    assert machine.view("other")["state"] == "detached"
    assert "by hand" not in machine.log()
    assert not [line for line in machine.commands() if "--consumer-alive" in line]
    assert sum(" daemon volume " in line for line in machine.commands()) == 2


@needs_machine
def test_what_others_have_mounted_there_since_is_left_alone(machine: Machine) -> None:
    where = _mounted_volume(machine, "data", replicas=1)
    machine.cut_power()
    machine.boot(first=f"mount -t tmpfs foreign {where}")
    until(lambda: "already" in (machine.view("data")["message"] or ""), "the refusal is told")
    assert machine.mounts()[where] == "foreign"
    machine.run("umount", where)
    until(lambda: _is_back(machine, "data", where), "mounted when the place is free")
    assert machine.inside(f"{where}/file").read_bytes() == CONTENT


@needs_machine
def test_what_was_unmounted_by_hand_before_stays_unmounted(machine: Machine) -> None:
    where = _mounted_volume(machine, "data", replicas=1)
    machine.run("umount", where)
    until(lambda: "by hand" in machine.log(), "the wish is dropped")
    machine.cut_power()
    machine.boot()
    until(lambda: machine.view("data")["state"] == "attached", "attached")
    assert machine.view("data")["mount"] is None
    assert where not in machine.mounts()


def _filled(path: Path, boot_id: str) -> SqliteStore:
    """A store as a node service leaves it in that boot."""
    store = SqliteStore(path)
    store.create(Node(metadata=Metadata(name="node")))
    modify_status(store, Node, "node", lambda n: setattr(n, "status", NodeStatus(boot_id=boot_id)))
    spec = VolumeSpec(size_bytes=1 << 20, attached=True, frontend="fuse", mount=Mount("/data"))
    store.create(Volume(metadata=Metadata(name="data"), spec=spec))
    status = VolumeStatus(
        state="attached",
        established=True,
        epoch=7,
        frontend="fuse",
        device="/dev/loop0",
        nbd_uri="nbd+unix:///data",
        mount="/data",
        pid=1,
        short_since="2026-01-01T00:00:00Z",
        problem=Problem("state", "it was busy"),
    )
    modify_status(store, Volume, "data", lambda v: setattr(v, "status", status))
    store.create(Snapshot(metadata=Metadata(name="data@one"), spec=SnapshotSpec("data", "one")))
    shown = SnapshotStatus(
        ready=True, layer_id=3, frontend="fuse", device="/dev/loop1", nbd_uri="x"
    )
    modify_status(store, Snapshot, "data@one", lambda s: setattr(s, "status", shown))
    store.create(Replica(metadata=Metadata(name="r"), spec=ReplicaSpec("data", "node", "d", "/r")))
    failed = ReplicaStatus(
        state="failed", provisioned=True, pid=2, failed_since="2026-01-01T00:00:00Z"
    )
    modify_status(store, Replica, "r", lambda r: setattr(r, "status", failed))
    return store


def test_a_reboot_ends_what_only_the_kernel_knew_and_keeps_the_rest(tmp_path: Path) -> None:
    store = _filled(tmp_path / "state.db", "another boot")
    assert boot.forget_other_boot(store, "node") == boot.boot_id()
    volume = store.get(Volume, "data")
    assert volume.spec.attached
    assert volume.spec.mount == Mount("/data")
    assert volume.status == VolumeStatus(state="detached", established=True, epoch=7)
    assert store.get(Snapshot, "data@one").status == SnapshotStatus(ready=True, layer_id=3)
    # Off for long is not missing for long: it is waited for before another one takes its place.
    assert store.get(Replica, "r").status == ReplicaStatus(state="failed", provisioned=True)
    # Written down after that only: a crash in between would lose the news.
    assert store.get(Node, "node").status.boot_id == "another boot"


@pytest.mark.parametrize("before", ["this boot", ""])
def test_without_a_known_reboot_nothing_is_forgotten(tmp_path: Path, before: str) -> None:
    store = _filled(tmp_path / "state.db", boot.boot_id() if before else "")
    volume = store.get(Volume, "data")
    assert boot.forget_other_boot(store, "node") == boot.boot_id()
    assert store.get(Volume, "data") == volume
