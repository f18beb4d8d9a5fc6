"""Verifying a volume from the command line and over the API.

Proves against a fake API when `volume verify` ends with 0, 1 and 5, and with a real node service
that damage on a disk is found, repaired and shown, and that a volume without a daemon is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockd.cli import volume as volume_commands
from protocol.errors import ConflictError
from tests.blockd.cli_fake_node import FakeNode, Run, serving_unix, verify_view, volume_view
from tests.blockd.node_harness import NodeHarness, until, write

VERIFY = ("volume", "verify", "data", "--timeout", "5")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    monkeypatch.setattr(volume_commands, "POLL_SECONDS", 0.0)
    with serving_unix(tmp_path / "blockd.sock") as fake:
        started = volume_view(verify=verify_view(running=True))
        fake.answer("POST", "/v1/volumes/data/verify", started)
        yield fake


def answers(node: FakeNode, *reports: dict[str, Any] | None) -> None:
    views = [volume_view(verify=report) for report in reports]
    node.answer("GET", "/v1/volumes/data", *views)


def test_it_waits_until_everything_is_verified(node: FakeNode, run: Run) -> None:
    answers(node, verify_view(running=True), verify_view(running=True), verify_view())
    code, printed, _ = run(*VERIFY, "-o", "json")
    assert code == 0
    assert json.loads(printed)["verify"]["repaired_blocks"] == 3


def test_the_table_names_what_was_found_and_where(node: FakeNode, run: Run) -> None:
    answers(node, verify_view())
    code, printed, _ = run(*VERIFY)
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert ["bad", "blocks", "3"] in lines
    assert ["not", "repaired", "0"] in lines
    assert any("3f2a9c10-0000-4000-8000-000000000001" in line for line in lines)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (verify_view(repaired_blocks=1, unrepaired_blocks=2), "2 blocks of volume data"),
        (verify_view(error="all replicas were lost"), "all replicas were lost"),
        (None, "restarted"),
    ],
)
def test_what_is_not_well_in_the_end_is_a_failure(
    node: FakeNode, run: Run, report: dict[str, Any] | None, words: str
) -> None:
    answers(node, report)
    code, _, complaint = run(*VERIFY)
    assert code == 1
    assert words in complaint


def test_the_time_can_run_out(node: FakeNode, run: Run) -> None:
    answers(node, verify_view(running=True))
    code, _, complaint = run("volume", "verify", "data", "--timeout", "0")
    assert code == 5
    assert "goes on" in complaint


def test_without_waiting_it_returns_at_once(node: FakeNode, run: Run) -> None:
    assert run("volume", "verify", "data", "--no-wait")[0] == 0
    assert not [asked for asked in node.asked if asked.method == "GET"]


def test_a_node_service_verifies_its_volume(tmp_path: Path) -> None:
    node = NodeHarness(tmp_path / "home")
    try:
        node.create("data", replicas=2)
        with pytest.raises(ConflictError, match="volume attach data"):
            node.operations.verify("data")
        content = bytes(range(256)) * 256
        write(node.attach("data"), content, tmp_path / "in")
        path = Path(node.view("data").replicas[0].path) / "layers" / "1.layer"
        with open(path, "r+b", buffering=0) as file:
            file.seek(3 * 4096)  # inside block 1
            file.write(b"damaged")
        assert node.operations.verify("data").verify is not None
        until(lambda: not _report(node).running, "the verification ended")
        report = _report(node)
        assert (report.bad_blocks, report.repaired_blocks, report.error) == (1, 1, None)
        assert path.read_bytes()[3 * 4096 : 4 * 4096] == content[4096:8192]
    finally:
        node.close()


def _report(node: NodeHarness) -> Any:
    report = node.view("data").verify
    assert report is not None
    return report
