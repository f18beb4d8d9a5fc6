"""Proves that replicas of one volume are rebuilt one after the other, and that whoever asked for a
rebuild waits for its turn instead of giving up: in the command line and in the node service."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from blockd.cli import main
from blockd.cli import replica as replica_commands
from blockd.node import control, reconcile_members
from blockd.node.control import Answer
from protocol.errors import StateError
from tests.blockd.cli_fake_node import FakeNode, replica_view, serving_unix, volume_view
from tests.blockd.node_harness import NodeHarness, until

OTHER = "3f2a9c10-0000-4000-8000-000000000001"
ASKED = "3f2b77de-0000-4000-8000-000000000002"


@pytest.mark.parametrize(("other_ends", "code"), [("IN_SYNC", 0), ("OUT", 6)])
def test_a_rebuild_waits_for_its_turn_however_long_the_other_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_ends: str, code: int
) -> None:
    monkeypatch.setattr(replica_commands, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(replica_commands, "START_SECONDS", 0.0)  # no time to start but in its turn
    turns = [("SYNCING", "OUT")] * 5
    turns += [("IN_SYNC", "SYNCING"), ("IN_SYNC", "IN_SYNC")] if code == 0 else [("OUT", "OUT")]
    views = [
        volume_view(replicas=[replica_view(OTHER, other), replica_view(ASKED, asked)])
        for other, asked in turns
    ]
    with serving_unix(tmp_path / "blockd.sock") as fake:
        fake.answer("POST", "/v1/volumes/data/rebuild", volume_view())
        fake.answer("GET", "/v1/volumes/data", *views)
        command = ["replica", "rebuild", "data", "--replica", ASKED, "--timeout", "5"]
        assert main(["--home", str(tmp_path), *command, "-o", "json"]) == code
        assert _count(fake) == len(views)


def test_the_progress_says_whose_turn_it_is() -> None:
    assert replica_commands.turn_text([OTHER], {ASKED}) == "3f2a9c10, 1 waits"
    assert replica_commands.turn_text([ASKED], {ASKED}) == "3f2b77de"
    assert replica_commands.turn_text([], {ASKED, OTHER}) == "2 wait"


def test_a_rebuild_that_cannot_start_at_once_stays_due(
    node: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    view = node.attach("data")
    os.kill(view.replicas[0].pid or 0, signal.SIGKILL)
    until(lambda: node.view("data").replicas[0].state == "OUT", "out")
    until(lambda: node.view("data").replicas[0].connected, "its daemon is back")
    until(
        lambda: "blockd replica rebuild data" in (node.view("data").replicas[0].message or ""),
        "it says when the rebuild begins, and how to begin it now",
    )
    refused: list[str] = []
    ask = control.ask

    def busy(path: Path, command: str, **arguments: object) -> Answer:
        if command == "rebuild" and len(refused) < 2:
            refused.append(command)
            raise StateError("snapshot x is under way; try again when it has ended")
        return ask(path, command, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reconcile_members.control, "ask", busy)
    node.operations.rebuild("data", None, 5.0)
    node.until_healthy("data", 2)
    assert len(refused) == 2


def _count(fake: FakeNode) -> int:
    return sum(asked.method == "GET" for asked in fake.asked)
