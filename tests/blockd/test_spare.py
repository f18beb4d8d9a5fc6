"""Proves that a spare process becomes the next volume daemon, is known by its command line then,
and does not outlive the node service that keeps it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from blockd.frontends import processes
from blockd.node.objects import Metadata, Volume, VolumeSpec
from blockd.node.supervisor import Supervisor
from tests.blockd.node_harness import WAIT_SECONDS, NodeHarness, until


def supervisor(node: NodeHarness) -> Supervisor:
    return node.service.context.supervisor


def spare_pid(node: NodeHarness) -> int:
    context = node.service.context
    volume = Volume(metadata=Metadata(name="any"), spec=VolumeSpec(size_bytes=1 << 20))
    supervisor(node).keep_spare(context.volume_daemon(volume, []))
    spare = supervisor(node)._spare
    assert spare is not None
    return spare.pid


def words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def test_it_becomes_the_next_volume_daemon(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    first = node.attach("data").pid
    pid = spare_pid(node)
    assert spare_pid(node) == pid, "one is enough"
    assert first
    os.kill(first, signal.SIGKILL)
    until(lambda: node.view("data").pid == pid, "the spare process serves")
    assert words(pid)[1:5] == ["-m", "blockd", "daemon", "volume"]
    log = node.root / "volumes" / "data" / "volume.log"
    assert "not closed cleanly" in log.read_text()
    node.restart()  # it is found again like any other daemon
    until(lambda: node.view("data").state == "attached", "attached")
    assert node.view("data").pid == pid
    node.operations.detach("data", WAIT_SECONDS)
    assert processes.wait_for_end(pid, WAIT_SECONDS)


def test_one_that_was_killed_is_done_without(node: NodeHarness) -> None:
    node.create("data")
    pid = spare_pid(node)
    os.kill(pid, signal.SIGKILL)
    assert processes.wait_for_end(pid, WAIT_SECONDS)
    assert node.attach("data").state == "attached"


def test_it_ends_with_the_node_service(node: NodeHarness) -> None:
    pid = spare_pid(node)
    node.restart()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
