"""Proves that a volume's only replica lives inside the volume daemon: one process, one owner of the
directory at any time, whatever is added, removed or killed; and that no data is lost by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.node import control, local_replicas
from blockd.node.objects import Replica, Volume
from blockd.node.store import modify_status
from protocol.errors import StorageError
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, read, until, write

CONTENT = os.urandom(4 * MIB)


def test_a_single_replica_has_no_process_of_its_own(node: NodeHarness, tmp_path: Path) -> None:
    view = node.create("data")
    (replica,) = view.replicas
    assert (view.health, replica.state, replica.pid) == ("healthy", "IN_SYNC", None)
    assert replica.address == f"dir:{replica.path}"
    assert _daemons(node) == []
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    assert view.replicas[0].pid == view.pid
    assert [kind for kind, _ in _daemons(node)] == ["volume"]
    until(lambda: node.view("data").allocated_bytes > len(CONTENT), "the space is counted")
    node.operations.detach("data", WAIT_SECONDS)
    assert (node.view("data").health, node.view("data").replicas[0].pid) == ("healthy", None)
    assert _daemons(node) == []
    assert _content(node, tmp_path) == CONTENT


def test_a_killed_volume_daemon_opens_its_replica_again(node: NodeHarness, tmp_path: Path) -> None:
    node.create("data")
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    os.kill(view.pid or 0, signal.SIGKILL)
    until(lambda: node.view("data").pid not in (None, view.pid), "a new volume daemon")
    node.until_healthy("data", 1)
    assert node.view("data").epoch > view.epoch
    assert _content(node, tmp_path) == CONTENT


def test_a_second_replica_is_added_and_the_first_gets_a_daemon_at_the_next_start(
    node: NodeHarness, tmp_path: Path
) -> None:
    first = node.create("data", rebuild_wait_seconds=3600).replicas[0]
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    node.operations.replica_add("data", WAIT_SECONDS)
    node.until_healthy("data", 2)
    assert node.view("data").pid == view.pid, "nobody was disturbed"
    local, added = _local(node)
    assert local == [first.id]
    assert len(added) == 1
    node.operations.detach("data", WAIT_SECONDS)
    until(lambda: _local(node)[0] == [], "both have daemons")
    node.until_healthy("data", 2)
    assert sorted(kind for kind, _ in _daemons(node)) == ["replica", "replica"]
    assert _content(node, tmp_path) == CONTENT


def test_a_volume_daemon_killed_with_a_second_replica_leaves_both_to_daemons(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data")
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    node.operations.replica_add("data", WAIT_SECONDS)
    node.until_healthy("data", 2)
    os.kill(view.pid or 0, signal.SIGKILL)
    until(lambda: node.view("data").pid not in (None, view.pid), "a new volume daemon")
    node.until_healthy("data", 2)
    assert _local(node)[0] == []
    assert _content(node, tmp_path) == CONTENT


@pytest.mark.parametrize("restart", ["none", "node service", "volume daemon"])
def test_back_to_one_replica_it_moves_into_the_volume_daemon_at_the_next_start(
    node: NodeHarness, tmp_path: Path, restart: str
) -> None:
    leaving, staying = node.create("data", replicas=2).replicas
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    node.operations.replica_remove("data", leaving.id, WAIT_SECONDS)
    assert node.view("data").pid == view.pid, "nobody was disturbed"
    assert _local(node) == ([], [staying.id])
    if restart == "volume daemon":
        os.kill(view.pid or 0, signal.SIGKILL)
        until(lambda: node.view("data").pid not in (None, view.pid), "a new volume daemon")
    else:
        if restart == "node service":
            node.restart()
            until(lambda: node.view("data").state == "attached", "attached")
            assert _local(node) == ([], [staying.id]), "as long as the volume daemon runs"
        node.operations.detach("data", WAIT_SECONDS)
        node.attach("data")
    node.until_healthy("data", 1)
    assert _local(node) == ([staying.id], [])
    assert [kind for kind, _ in _daemons(node)] == ["volume"]
    assert _content(node, tmp_path) == CONTENT


def test_the_local_replica_can_be_the_one_that_goes_while_requests_run(
    node: NodeHarness, tmp_path: Path
) -> None:
    first = node.create("data").replicas[0]
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    node.operations.replica_add("data", WAIT_SECONDS)
    node.until_healthy("data", 2)
    load = subprocess.Popen(
        [
            *["fio", "--name=load", "--ioengine=nbd", f"--uri={view.nbd_uri}", "--rw=randrw"],
            *["--bs=4k", "--iodepth=8", "--offset=32m", "--size=16m", "--fsync=16"],
            *["--time_based", "--runtime=2"],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    path = node.service.context.volume_daemon(_volume(node), []).control
    before = control.status(path)["counters"]["writes"]
    until(lambda: control.status(path)["counters"]["writes"] > before + 100, "the load runs")
    node.operations.replica_remove("data", first.id, WAIT_SECONDS)
    assert not Path(first.path).exists()
    said, _ = load.communicate(timeout=WAIT_SECONDS)
    assert load.returncode == 0, said.decode()
    assert node.view("data").pid == view.pid, "the volume daemon goes on"
    node.until_healthy("data", 1)
    assert _content(node, tmp_path) == CONTENT


def test_a_missing_directory_is_a_failed_replica_and_never_made_again(
    node: NodeHarness, tmp_path: Path
) -> None:
    replica = node.create("data").replicas[0]
    write(node.attach("data"), CONTENT, tmp_path / "in")
    node.operations.detach("data", WAIT_SECONDS)
    moved = Path(replica.path).with_suffix(".away")
    Path(replica.path).rename(moved)
    with pytest.raises(Exception, match="not a replica directory"):
        node.operations.attach("data", "socket", 2.0)
    view = node.view("data")
    assert view.health == "faulted"
    assert "not a replica directory" in (view.message or "")
    assert not Path(replica.path).exists()
    moved.rename(replica.path)
    until(lambda: node.view("data").state == "attached", "it heals when the directory is back")
    assert _content(node, tmp_path) == CONTENT


def test_a_directory_in_use_by_somebody_else_is_said_and_waited_for(node: NodeHarness) -> None:
    replica = node.create("data").replicas[0]
    with _by_hand(node, replica.path) as other:
        try:
            with pytest.raises(Exception, match=f"in use by process {other.pid}"):
                node.operations.attach("data", "socket", 2.0)
        finally:
            other.terminate()
    assert node.attach("data").state == "attached"


def test_a_half_made_directory_of_a_new_volume_is_made_and_later_never(node: NodeHarness) -> None:
    replica = node.create("data").replicas[0]
    item = node.service.context.store.get(Replica, replica.id)
    volume = _volume(node)
    item.status.provisioned = False
    with pytest.raises(StorageError, match="never made"):
        local_replicas.make_directory(volume, item, None)
    volume.status.established = False
    item.spec.path = str(node.root / "half")
    (node.root / "half" / "layers").mkdir(parents=True)
    (node.root / "half" / "index").touch()
    local_replicas.make_directory(volume, item, None)
    local_replicas.check_directory(item)


def test_a_replica_that_has_a_daemon_from_before_gives_its_directory_free(
    node: NodeHarness, tmp_path: Path
) -> None:
    replica = node.create("data").replicas[0]
    context, volume = node.service.context, _volume(node)
    item = modify_status(context.store, Replica, replica.id, lambda r: None)
    context.supervisor.ensure(context.replica_daemon(volume, item))
    view = node.attach("data")
    assert [kind for kind, _ in _daemons(node)] == ["volume"]
    write(view, CONTENT, tmp_path / "in")
    assert _content(node, tmp_path) == CONTENT


def test_a_volume_daemon_that_still_opens_is_found_by_a_new_service(node: NodeHarness) -> None:
    node.create("data")
    view = node.attach("data")
    os.kill(view.pid or 0, signal.SIGSTOP)  # does not answer, as while it opens a large volume
    try:
        node.restart()
        spec = node.service.context.volume_daemon(_volume(node), [])
        assert node.service.context.supervisor.pid(spec) == view.pid
    finally:
        os.kill(view.pid or 0, signal.SIGCONT)
    until(lambda: node.view("data").state == "attached", "attached")
    assert node.view("data").pid == view.pid


def _volume(node: NodeHarness) -> Volume:
    return node.service.context.store.get(Volume, "data")


def _content(node: NodeHarness, tmp_path: Path) -> bytes:
    return read(node.attach("data"), tmp_path / "out")[: len(CONTENT)]


def _local(node: NodeHarness) -> tuple[list[str], list[str]]:
    """The replicas in the volume daemon, and those with a daemon, as the record tells."""
    record = node.service.context.authority.load(node.view("data").uid)
    assert record is not None
    local = [uid for uid, item in record.members.items() if item.address.startswith("dir:")]
    return local, [uid for uid in record.members if uid not in local]


def _daemons(node: NodeHarness) -> list[tuple[str, int]]:
    """Kind and pid of all daemons of this home, as /proc tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"daemon" in words and str(node.root).encode() in b" ".join(words):
            kind = words[words.index(b"daemon") + 1].decode()
            found.append((kind, int(entry.parent.name)))
    return found


def _by_hand(node: NodeHarness, path: str) -> subprocess.Popen[bytes]:
    """A replica daemon an operator started on the same directory."""
    command = [sys.executable, "-m", "blockd", "daemon", "replica", path]
    other = subprocess.Popen(
        [*command, "--listen", f"unix:{node.root}/other.sock"], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline().startswith(b"ready")
    return other
