"""Proves that replicas are made equal without being asked to, several at a time, that a request
makes it happen at once, and that what the user wants of rebuilds reaches the volume daemon.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from blockd.node import control, reconcile_members
from blockd.node.control import Answer
from protocol.errors import RequestError, StateError
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, read, until, write

CONTENT = os.urandom(MIB)


def states(node: NodeHarness) -> list[str]:
    return [replica.state for replica in node.view("data").replicas]


def status(node: NodeHarness) -> Answer:
    """What the volume daemon says."""
    volume = node.view("data")
    sockets = node.service.context.home.socket_directory("data", volume.uid)
    return control.status(sockets / "volume.control")


def test_replicas_that_were_away_come_back_in_sync_by_themselves(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=3, rebuild_wait_seconds=3600)
    write(node.attach("data"), CONTENT, tmp_path / "in")
    before = node.view("data")
    for replica in before.replicas[:2]:
        os.kill(replica.pid or 0, signal.SIGKILL)
    write(before, CONTENT[::-1], tmp_path / "in")
    node.until_healthy("data", 3)
    after = node.view("data")
    assert [replica.id for replica in after.replicas] == [r.id for r in before.replicas]
    os.kill(after.replicas[2].pid or 0, signal.SIGKILL)
    assert read(after, tmp_path / "out")[:MIB] == CONTENT[::-1]


def test_a_request_is_taken_even_if_it_cannot_be_done_at_once(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    lost = node.attach("data").replicas[0]
    asked: list[str] = []
    ask = control.ask

    def busy(path: Path, command: str, **arguments: object) -> Answer:
        if command == "rebuild":
            asked.append(command)
            raise StateError("the replica is not connected")
        return ask(path, command, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reconcile_members.control, "ask", busy)
    path = Path(lost.path)
    path.rename(path.with_suffix(".away"))
    os.kill(lost.pid or 0, signal.SIGKILL)
    until(lambda: "OUT" in states(node), "out")
    path.with_suffix(".away").rename(path)
    until(lambda: node.view("data").replicas[0].pid, "its daemon runs")
    node.operations.rebuild("data", None, WAIT_SECONDS)
    node.until_healthy("data", 2)


def test_what_the_user_wants_reaches_the_volume_daemon(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    node.attach("data")
    node.operations.change("data", {"min_in_sync": 2, "rebuild_bandwidth": 1 << 20})
    volume = node.view("data")
    assert (volume.min_in_sync, volume.rebuild_bandwidth) == (2, 1 << 20)
    until(lambda: status(node)["min_in_sync"] == 2, "it is in the record")
    assert status(node)["rebuild_bandwidth"] == 1 << 20
    with pytest.raises(RequestError, match="above the 2 replicas"):
        node.operations.change("data", {"min_in_sync": 3})


def test_with_too_few_in_sync_writes_wait_and_the_volume_says_so(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    lost = node.attach("data").replicas[0]
    node.operations.change("data", {"min_in_sync": 2})
    until(lambda: status(node)["min_in_sync"] == 2, "it is in the record")
    path = Path(lost.path)
    path.rename(path.with_suffix(".away"))
    os.kill(lost.pid or 0, signal.SIGKILL)
    until(lambda: "1 of at least 2 replicas" in (node.view("data").message or ""), "it says so")
    writing = threading.Thread(target=write, args=(node.view("data"), CONTENT, tmp_path / "in"))
    writing.start()
    until(lambda: status(node)["counters"]["writes"] > 0, "the write is under way")
    assert writing.is_alive()
    assert read(node.view("data"), tmp_path / "out")[:MIB] == CONTENT, "it is only not answered"
    path.with_suffix(".away").rename(path)
    writing.join(WAIT_SECONDS)
    assert not writing.is_alive()
    node.until_healthy("data", 2)
