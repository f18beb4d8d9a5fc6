"""Proves that `blockd doctor` needs no node service, names what is missing and its package, and
that its exit code tells whether volumes can become block devices."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockd.cli import machine
from blockd.frontends import tools
from tests.blockd.cli_fake_node import Run


def findings(run: Run) -> tuple[int, dict[str, tuple[bool | None, str]]]:
    code, printed, _ = run("doctor", "-o", "json")
    answer = json.loads(printed)
    assert answer["device"] == (code == 0)
    return code, {item["check"]: (item["ok"], item["text"]) for item in answer["findings"]}


def test_a_machine_with_a_device_front_end_is_fine(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"nbd": "no driver", "fuse": None, "socket": None}
    monkeypatch.setattr(machine, "availability", lambda: found)
    code, told = findings(run)
    assert code == 0
    assert told["front end nbd"] == (None, "no driver")
    assert told["front end fuse"] == (True, "usable")
    assert told["Python"][0]
    assert told["node service"][0] is None
    assert "blockd serve" in told["node service"][1]
    assert {"mount", "ext4", "xfs", "disk space", "io_uring", "memory lock limit"} <= set(told)


def test_a_socket_alone_is_no_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"nbd": "no driver", "fuse": "no root", "socket": None}
    monkeypatch.setattr(machine, "availability", lambda: found)
    code, _ = findings(run)
    assert code == 6
    code, printed, complaint = run("doctor")
    assert code == 6
    assert "no driver" in printed
    assert "--frontend socket" in complaint


def test_missing_programs_come_with_their_package(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "path_of", lambda tool: None)
    _, told = findings(run)
    assert told["xfs"] == (None, "mkfs.xfs not installed; apt-get install xfsprogs")
    assert "apt-get install qemu-utils" in told["disk images"][1]


def test_without_root_it_says_what_needs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, told = findings(run)
    assert code == 6
    assert "NBD addresses do not" in told["root"][1]
    assert "needs root" in told["front end nbd"][1]


def test_a_full_disk_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 1, "total": 100}))
    finding = machine._space(tmp_path / "not" / "there")
    assert finding.ok is False
    assert "writes pause" in finding.text
