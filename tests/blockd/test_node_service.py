"""Proves the life of volumes in the node service, with real daemons and the socket front end:
wishes become true, failures heal, the service can go away at any time, and no data is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.node import control
from blockd.node.objects import Snapshot, Volume
from blockd.node.store import modify
from protocol.errors import ConflictError, NotFoundError, RequestError
from replication.authority import IN_SYNC
from tests.blockd.node_harness import (
    MIB,
    WAIT_SECONDS,
    NodeHarness,
    read,
    until,
    write,
)

CONTENT = os.urandom(1 * MIB)


def test_a_new_volume_is_detached_healthy_and_has_its_replicas(node: NodeHarness) -> None:
    view = node.create("data", replicas=2)
    assert (view.state, view.health, view.pid) == ("detached", "healthy", None)
    assert [replica.state for replica in view.replicas] == ["IN_SYNC", "IN_SYNC"]
    assert all(replica.pid and Path(replica.path).is_dir() for replica in view.replicas)


def test_a_volume_is_attached_written_and_detached(node: NodeHarness, tmp_path: Path) -> None:
    node.create("data", replicas=2)
    view = node.attach("data")
    assert (view.state, view.frontend, view.device) == ("attached", "socket", None)
    write(view, CONTENT, tmp_path / "in")
    view = node.operations.detach("data", WAIT_SECONDS)
    assert (view.state, view.nbd_uri, view.pid) == ("detached", None, None)
    assert read(node.attach("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT


def test_a_detach_is_refused_while_a_client_is_connected(node: NodeHarness, tmp_path: Path) -> None:
    node.create("data")
    view = node.attach("data")
    client = subprocess.Popen(
        ["qemu-io", "-f", "raw", view.nbd_uri or ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        path = node.service.context.volume_daemon(_volume(node), []).control
        until(lambda: control.status(path)["connections"] == 1, "the client is connected")
        with pytest.raises(ConflictError, match="in use by 1 NBD connection"):
            node.operations.detach("data", WAIT_SECONDS)
        assert _volume(node).spec.attached, "a refused detach must not come true later"
    finally:
        client.communicate(b"quit\n", timeout=WAIT_SECONDS)
    assert node.operations.detach("data", WAIT_SECONDS).state == "detached"


def test_a_new_service_finds_what_runs_and_starts_nothing_twice(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=2)
    before = node.attach("data")
    write(before, CONTENT, tmp_path / "in")
    node.restart()
    until(lambda: node.view("data").state == "attached", "attached")
    after = node.view("data")
    assert (after.pid, after.epoch, after.nbd_uri) == (before.pid, before.epoch, before.nbd_uri)
    assert {r.id: r.pid for r in after.replicas} == {r.id: r.pid for r in before.replicas}
    assert _volume_daemons(node) == [before.pid]
    # A daemon the new service did not start is watched all the same.
    os.kill(after.replicas[0].pid or 0, signal.SIGKILL)
    until(lambda: node.view("data").replicas[0].pid not in (None, before.replicas[0].pid), "back")
    node.until_healthy("data", 2)
    assert read(node.view("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT


def test_a_killed_replica_daemon_is_restarted_and_rebuilt(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=2)
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    for victim in view.replicas:
        os.kill(victim.pid or 0, signal.SIGKILL)
        until(lambda: node.view("data").health != "healthy", "the loss is seen")
        node.until_healthy("data", 2)
    # Both were killed in turn, so what is read now went through both rebuilds.
    assert read(node.view("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT
    assert node.view("data").epoch == view.epoch, "the volume daemon was not restarted"


def test_a_killed_volume_daemon_comes_back_with_a_higher_epoch(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=2)
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    os.kill(view.pid or 0, signal.SIGKILL)
    until(lambda: (node.view("data").pid or view.pid) != view.pid, "a new volume daemon")
    node.until_healthy("data", 2)
    assert node.view("data").epoch > view.epoch
    assert read(node.view("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT


@pytest.mark.parametrize("attached", [False, True])
def test_a_lost_replica_directory_is_replaced_and_never_made_blank(
    node: NodeHarness, tmp_path: Path, attached: bool
) -> None:
    node.create("data", replicas=2)
    write(node.attach("data"), CONTENT, tmp_path / "in")
    if not attached:
        node.operations.detach("data", WAIT_SECONDS)
    lost, kept = node.view("data").replicas
    shutil.rmtree(lost.path)
    os.kill(lost.pid or 0, signal.SIGKILL)
    until(lambda: lost.id not in {r.id for r in node.view("data").replicas}, "the lost one goes")
    node.until_healthy("data", 2)
    assert not Path(lost.path).exists()
    assert kept.id in {replica.id for replica in node.view("data").replicas}
    if not attached:
        node.attach("data")
    assert read(node.view("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT


def test_a_lost_copy_of_a_detached_volume_shows_as_degraded(node: NodeHarness) -> None:
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    lost = node.view("data").replicas[0]
    shutil.rmtree(lost.path)
    os.kill(lost.pid or 0, signal.SIGKILL)
    until(lambda: node.view("data").health == "degraded", "degraded")
    assert {replica.id: replica.state for replica in node.view("data").replicas}[lost.id] == "OUT"
    until(lambda: "does not exist" in (node.view("data").message or ""), "the reason is told")


@pytest.mark.parametrize("attached", [False, True])
def test_snapshots_are_made_reverted_to_and_removed(
    node: NodeHarness, tmp_path: Path, attached: bool
) -> None:
    node.create("data", replicas=2)
    write(node.attach("data"), CONTENT, tmp_path / "in")
    if not attached:
        node.operations.detach("data", WAIT_SECONDS)
    made = node.operations.snapshot_create("data", "one", {"a": "b"}, WAIT_SECONDS)
    assert made.ready
    assert made.labels == {"a": "b"}
    with pytest.raises(ConflictError, match="data@one exists already"):
        node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    write(node.attach("data"), os.urandom(MIB), tmp_path / "in")
    if not attached:
        node.operations.detach("data", WAIT_SECONDS)
    view = node.operations.revert("data", "one", False, WAIT_SECONDS)
    assert view.state == ("attached" if attached else "detached")
    assert read(node.attach("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT
    node.operations.snapshot_remove("data", "one", WAIT_SECONDS)
    assert node.view("data").snapshots == []
    assert read(node.view("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT


def test_a_snapshot_made_past_the_service_gets_an_object(node: NodeHarness) -> None:
    node.create("data")
    node.attach("data")
    path = node.service.context.volume_daemon(_volume(node), []).control
    control.ask(path, "snapshot-create", name="by-hand", labels={})
    node.operations.snapshot_create("data", "next", {}, WAIT_SECONDS)
    assert [item.name for item in node.view("data").snapshots] == ["by-hand", "next"]


def test_a_snapshot_made_just_before_a_crash_is_not_made_twice(node: NodeHarness) -> None:
    node.create("data")
    node.attach("data")
    node.operations.snapshot_create("data", "one", {}, WAIT_SECONDS)
    item = node.service.context.store.get(Snapshot, "data@one")
    item.status.ready, item.status.layer_id = False, None  # as if the crash came before this write
    node.service.context.store.update_status(item)
    node.restart()
    until(lambda: node.view("data").snapshots, "the snapshot is ready again")
    (found,) = node.view("data").snapshots
    assert found.id == 1


def test_replicas_are_added_rebuilt_and_removed(node: NodeHarness, tmp_path: Path) -> None:
    first = node.create("data", rebuild_wait_seconds=3600).replicas[0]
    with pytest.raises(ConflictError, match="last one"):
        node.operations.replica_remove("data", first.id, WAIT_SECONDS)
    write(node.attach("data"), CONTENT, tmp_path / "in")
    view = node.operations.replica_add("data", WAIT_SECONDS)
    assert first.id in [item.id for item in view.replicas]
    assert view.replica_count == 2
    node.until_healthy("data", 2)
    view = node.operations.replica_remove("data", first.id, WAIT_SECONDS)
    assert view.replica_count == 1
    assert not Path(first.path).exists()
    node.until_healthy("data", 1)
    assert read(node.view("data"), tmp_path / "out")[: len(CONTENT)] == CONTENT


def test_a_detached_volume_is_rebuilt_too_and_its_daemon_stops_after(node: NodeHarness) -> None:
    node.create("data", rebuild_wait_seconds=3600)
    node.operations.replica_add("data", WAIT_SECONDS)
    node.until_healthy("data", 2)
    until(lambda: _volume_daemons(node) == [], "the volume daemon is stopped")
    assert node.view("data").state == "detached"


def test_removing_a_volume_leaves_no_process_and_no_file(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    node.attach("data")
    pids = [replica.pid or 0 for replica in node.view("data").replicas]
    with pytest.raises(ConflictError, match="attached"):
        node.operations.remove("data", False, WAIT_SECONDS)
    node.operations.remove("data", True, WAIT_SECONDS)
    assert not any((node.root / part / "data").exists() for part in ("replicas", "volumes"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(NotFoundError):
        node.view("data")
    assert node.create("data").snapshots == [], "the name is free again"


def test_a_lost_record_is_an_error_and_no_reason_to_start_anew(node: NodeHarness) -> None:
    node.create("data")
    node.service.context.authority.delete(node.view("data").uid)
    with pytest.raises(Exception, match="record of volume data is missing"):
        node.attach("data")
    assert node.service.context.authority.load(node.view("data").uid) is None


def test_a_fenced_volume_daemon_is_left_alone_until_the_user_decides(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    view = node.attach("data")
    other = subprocess.Popen(_by_hand(node), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        until(lambda: "another owner" in (node.view("data").message or ""), "the fencing is told")
        record = node.service.context.authority.load(view.uid)
        assert record is not None
        assert record.epoch == view.epoch + 1, "the other owner is not fenced in return"
    finally:
        other.terminate()
        other.communicate(timeout=WAIT_SECONDS)
    node.operations.detach("data", WAIT_SECONDS)
    assert node.attach("data").epoch > view.epoch + 1


def test_a_volume_daemon_in_trouble_says_so_and_recovers(node: NodeHarness) -> None:
    node.create("data")
    view = node.attach("data")
    replica = view.replicas[0]
    moved = Path(replica.path).with_suffix(".away")
    Path(replica.path).rename(moved)
    os.kill(view.pid or 0, signal.SIGKILL)
    until(lambda: node.view("data").health == "faulted", "faulted")
    moved.rename(replica.path)
    node.until_healthy("data", 1)
    record = node.service.context.authority.load(view.uid)
    assert record is not None
    assert record.members[replica.id].state == IN_SYNC


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda o: o.attach("none", "auto", 1), NotFoundError),
        (lambda o: o.snapshot_create("none", "s", {}, 1), NotFoundError),
        (lambda o: o.attach("data", "floppy", 1), RequestError),
        (lambda o: o.attach("data", "iscsi", 1), RequestError),
        (lambda o: o.mount("data", None, "ext4", 1), ConflictError),
        (lambda o: o.mount("data", "relative/path", "ext4", 1), RequestError),
        (lambda o: o.mount("data", "/", "ext4", 1), RequestError),
        (lambda o: o.mount("data", None, "ntfs", 1), RequestError),
        (lambda o: o.snapshot_create("data", "UPPER", {}, 1), RequestError),
        (lambda o: o.revert("data", "none", False, 1), NotFoundError),
        (lambda o: o.replica_remove("data", "none", 1), NotFoundError),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_done(
    node: NodeHarness, call: object, error: type[Exception]
) -> None:
    node.create("data")
    before = _volume(node).spec
    assert callable(call)
    with pytest.raises(error):
        call(node.operations)
    assert _volume(node).spec == before


def test_a_wish_written_while_no_service_runs_comes_true_later(node: NodeHarness) -> None:
    node.create("data")
    modify(
        node.service.context.store, Volume, "data", lambda v: setattr(v.spec, "frontend", "socket")
    )
    node.service.stop_doors()
    modify(node.service.context.store, Volume, "data", lambda v: setattr(v.spec, "attached", True))
    node.restart()
    until(lambda: node.view("data").state == "attached", "attached")


def _volume(node: NodeHarness) -> Volume:
    return node.service.context.store.get(Volume, "data")


def _volume_daemons(node: NodeHarness) -> list[int]:
    """The pids of all volume daemons of this home, as /proc tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"volume" in words and str(node.root / "state.db").encode() in words:
            found.append(int(entry.parent.name))
    return found


def _by_hand(node: NodeHarness) -> list[str]:
    """A second volume daemon on the same state, as an operator could start it."""
    context, volume = node.service.context, _volume(node)
    addresses = [replica.address or "" for replica in node.view("data").replicas]
    arguments = list(context.volume_daemon(volume, addresses).arguments)
    for option in ("--nbd", "--control"):
        place = arguments.index(option) + 1
        arguments[place] = arguments[place] + ".other"
    arguments[arguments.index("--pid-file") + 1] += ".other"
    return [sys.executable, "-m", "blockd", "daemon", *arguments]
