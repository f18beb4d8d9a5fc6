"""Rebuilding from the command line: which replicas, how long, and how it ends.

Proves against a fake API that `replica rebuild` ends with 0 only when every target is in sync, with
6 when one cannot be rebuilt and with 5 when the time is up, and that ids may be shortened safely.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockd.cli import replica as replica_commands
from tests.blockd.cli_fake_node import FakeNode, Run, replica_view, serving_unix, volume_view

FIRST = "3f2a9c10-0000-4000-8000-000000000001"
SECOND = "3f2b77de-0000-4000-8000-000000000002"
REBUILD = ("replica", "rebuild", "data", "--timeout", "5")  # ends even if the command is wrong


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    monkeypatch.setattr(replica_commands, "POLL_SECONDS", 0.0)
    with serving_unix(tmp_path / "blockd.sock") as fake:
        fake.answer("POST", "/v1/volumes/data/rebuild", volume_view())
        yield fake


def views(*states: str, health: str = "degraded") -> list[dict[str, Any]]:
    """The volume over time: its second replica goes through `states`."""
    return [
        volume_view(
            health="healthy" if state == "IN_SYNC" else health,
            message=None if state == "IN_SYNC" else "disk says no",
            replicas=[replica_view(FIRST), replica_view(SECOND, state, 0.5)],
        )
        for state in states
    ]


def test_a_rebuild_waits_until_the_replica_is_in_sync(node: FakeNode, run: Run) -> None:
    steps = views("OUT", "OUT", "SYNCING", "SYNCING", "IN_SYNC")
    node.answer("GET", "/v1/volumes/data", *steps)
    code, printed, _ = run(*REBUILD, "-o", "json")
    assert code == 0
    assert [replica["state"] for replica in json.loads(printed)] == ["IN_SYNC", "IN_SYNC"]
    assert [asked.body for asked in node.changes()] == [{}]
    assert sum(asked.method == "GET" for asked in node.asked) == len(steps)


def test_a_rebuild_that_falls_back_ends_degraded(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data", *views("OUT", "SYNCING", "OUT"))
    code, printed, complaint = run(*REBUILD)
    assert (code, printed) == (6, "")
    assert complaint.startswith(f"blockd: rebuild of replica {SECOND} of volume data stopped")
    assert "disk says no" in complaint


def test_a_rebuild_that_never_starts_ends_degraded(
    node: FakeNode, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_commands, "START_SECONDS", 0.0)
    node.answer("GET", "/v1/volumes/data", *views("OUT"))
    code, _, complaint = run(*REBUILD)
    assert code == 6
    assert "did not start" in complaint


def test_a_replica_removed_meanwhile_ends_the_wait(node: FakeNode, run: Run) -> None:
    gone = volume_view(replicas=[replica_view(FIRST)])
    node.answer("GET", "/v1/volumes/data", *views("OUT", "SYNCING"), gone)
    code, _, complaint = run(*REBUILD)
    assert code == 6
    assert "it is gone" in complaint


def test_a_rebuild_that_takes_too_long_ends_with_timeout(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data", *views("SYNCING"))
    code, _, complaint = run("replica", "rebuild", "data", "--timeout", "0")
    assert code == 5
    assert "goes on" in complaint


def test_a_rebuild_without_waiting_returns_at_once(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data", *views("OUT"))
    assert run("replica", "rebuild", "data", "--no-wait")[0] == 0
    assert len(node.changes()) == 1


def test_nothing_is_asked_for_when_all_are_in_sync(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data", *views("IN_SYNC"))
    assert run(*REBUILD)[0] == 0
    assert node.changes() == []


def test_only_the_replica_asked_for_is_rebuilt(node: FakeNode, run: Run) -> None:
    out = [replica_view(FIRST, "OUT"), replica_view(SECOND, "OUT")]
    done = [replica_view(FIRST, "OUT"), replica_view(SECOND)]
    node.answer("GET", "/v1/volumes/data", volume_view(replicas=out), volume_view(replicas=done))
    assert run(*REBUILD, "--replica", "3f2b")[0] == 0
    assert [asked.body for asked in node.changes()] == [{"replica": SECOND}]


@pytest.mark.parametrize(
    ("text", "code"), [("3f2a", 2), ("3f2", 2), ("a91", 2), ("ffff", 3), ("3f2z", 3)]
)
def test_an_unclear_or_unknown_replica_is_never_removed(
    node: FakeNode, run: Run, text: str, code: int
) -> None:
    alike = replica_view(FIRST.replace("9c10", "77ff"))
    view = volume_view(replicas=[*volume_view()["replicas"], alike])
    node.answer("GET", "/v1/volumes/data", view)
    ended, _, complaint = run("replica", "rm", "data", text)
    assert ended == code
    assert "blockd replica ls data" in complaint
    assert node.changes() == []


def test_a_clear_beginning_names_the_replica_to_remove(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data", volume_view())
    node.answer("DELETE", f"/v1/volumes/data/replicas/{SECOND}", b"", status=204)
    assert run("replica", "rm", "data", "3f2b")[0] == 0
    assert [asked.path for asked in node.changes()] == [f"/v1/volumes/data/replicas/{SECOND}"]
