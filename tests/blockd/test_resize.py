"""Resizing a volume from the command line and over the API, and counting what it holds.

Proves against a fake API what `volume resize` asks and says, and with a real node service that a
volume grows attached and detached, while a member is away, and that it cannot shrink.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from blockd.node import control
from protocol.errors import DeadlineError, RequestError, StateError
from tests.blockd.cli_fake_node import Run, serving_unix, volume_view
from tests.blockd.nbd_client import WRITE, NbdClient
from tests.blockd.node_harness import MIB, WAIT_SECONDS, NodeHarness, read, until, write

CONTENT = os.urandom(1 * MIB)


def test_the_command_asks_for_bytes(tmp_path: Path, run: Run) -> None:
    with serving_unix(tmp_path / "blockd.sock") as node:
        node.answer("POST", "/v1/volumes/data/resize", volume_view(size_bytes=20 << 30))
        code, printed, _ = run("volume", "resize", "data", "20G")
        assert code == 0
        assert "20" in printed
        (asked,) = node.changes()
        assert (asked.body, asked.query["wait"]) == ({"size_bytes": 20 << 30}, "60")
        code, _, told = run("volume", "resize", "data", "lots")
        assert code == 2
        assert "lots" in told


def test_an_attached_volume_grows_and_its_clients_use_the_new_part(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=2)
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    assert view.nbd_uri
    client = NbdClient(Path(view.nbd_uri.split("socket=")[1]), "data")
    grown = node.operations.resize("data", 100 * MIB, WAIT_SECONDS)
    assert grown.size_bytes == 100 * MIB
    client.run(WRITE, 100 * MIB - 4096, data=b"x" * 4096)
    client.socket.close()
    content = read(node.view("data"), tmp_path / "out")
    assert len(content) == 100 * MIB
    assert content[: len(CONTENT)] == CONTENT
    assert content.endswith(b"x" * 4096)
    node.restart()
    until(lambda: node.view("data").state == "attached", "attached")
    assert node.view("data").size_bytes == 100 * MIB


def test_a_detached_volume_grows_too(node: NodeHarness, tmp_path: Path) -> None:
    node.create("data", replicas=2)
    assert node.operations.resize("data", 100 * MIB, WAIT_SECONDS).size_bytes == 100 * MIB
    assert len(read(node.attach("data"), tmp_path / "out")) == 100 * MIB


def test_a_volume_cannot_shrink(node: NodeHarness) -> None:
    node.create("data")
    with pytest.raises(RequestError, match="cannot shrink"):
        node.operations.resize("data", 32 * MIB, WAIT_SECONDS)
    with pytest.raises(RequestError, match="multiple"):
        node.operations.resize("data", 65 * MIB + 1, WAIT_SECONDS)
    assert node.view("data").size_bytes == 64 * MIB


def test_a_refused_growth_waits_and_holds_nothing_else_up(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = control.ask

    def ask(path: Path, command: str, **arguments: Any) -> control.Answer:
        if command == "grow":
            raise StateError("cannot change the size during the rebuild of replica x")
        return real(path, command, **arguments)

    node.create("data", replicas=2)
    with monkeypatch.context() as patch:
        patch.setattr(control, "ask", ask)
        node.attach("data")
        with pytest.raises(DeadlineError, match="during the rebuild"):
            node.operations.resize("data", 100 * MIB, 1.0)
        assert node.view("data").size_bytes == 64 * MIB
        assert node.operations.detach("data", WAIT_SECONDS).state == "detached"
        node.attach("data")
    until(lambda: node.view("data").size_bytes == 100 * MIB, "it has grown")
    until(lambda: not node.view("data").message, "nothing waits")


def test_a_replica_that_was_killed_starts_with_its_old_size_and_follows(node: NodeHarness) -> None:
    node.create("data", replicas=2)
    node.attach("data")
    pid = node.view("data").replicas[1].pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    node.operations.resize("data", 100 * MIB, WAIT_SECONDS)
    node.until_healthy("data", 2)
    assert node.view("data").size_bytes == 100 * MIB


def test_usage_is_counted_by_a_member_of_the_running_volume(
    node: NodeHarness, tmp_path: Path
) -> None:
    node.create("data", replicas=2)
    with pytest.raises(StateError, match="counts data"):
        node.operations.usage("data", WAIT_SECONDS)
    view = node.attach("data")
    write(view, CONTENT, tmp_path / "in")
    node.operations.snapshot_create("data", "before", {}, WAIT_SECONDS)
    write(view, CONTENT[: MIB // 2][::-1], tmp_path / "in")
    with node.client() as client:
        used = client.get("/v1/volumes/data/usage").json()
    assert used["data_bytes"] == MIB
    assert used["snapshots"] == {"before": {"data_bytes": MIB, "exclusive_bytes": MIB // 2}}
