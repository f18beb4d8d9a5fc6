"""Proves that stable names follow the device: made, kept, replaced when they lead nowhere, removed
by their owner only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from blockd.node import links


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two block device nodes (no driver needed), and an own place for links."""
    monkeypatch.setattr(links, "DIRECTORY", tmp_path / "blockd")
    paths = [tmp_path / name for name in ("nbd0", "nbd1")]
    for number, path in enumerate(paths):
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(240, number))
        except PermissionError:
            pytest.skip("device nodes need root")
    return [str(path) for path in paths]


def test_a_link_is_made_and_removed_with_its_directory(devices: list[str]) -> None:
    links.make("data", devices[0], attached_now=True)
    assert os.readlink(links.DIRECTORY / "data") == devices[0]
    assert stat.S_IMODE(links.DIRECTORY.stat().st_mode) & 0o055 == 0o055, "for everybody to read"
    links.make("data@one", devices[1], attached_now=True)
    links.remove("data", devices[0])
    assert os.listdir(links.DIRECTORY) == ["data@one"]
    links.remove("data@one", devices[1])
    assert not links.DIRECTORY.exists()


def test_a_link_that_leads_nowhere_is_replaced(devices: list[str]) -> None:
    links.make("data", devices[0], attached_now=True)
    os.unlink(devices[0])
    links.make("data", devices[1], attached_now=False)
    assert os.readlink(links.DIRECTORY / "data") == devices[1]


def test_a_living_link_of_somebody_else_is_left_alone(devices: list[str]) -> None:
    """Two node services on one machine may have volumes of one name; the last attach wins."""
    links.make("data", devices[0], attached_now=True)
    links.make("data", devices[1], attached_now=False)
    assert os.readlink(links.DIRECTORY / "data") == devices[0]
    links.remove("data", devices[1])
    assert os.readlink(links.DIRECTORY / "data") == devices[0]
    links.make("data", devices[1], attached_now=True)
    assert os.readlink(links.DIRECTORY / "data") == devices[1]


def test_a_link_that_cannot_be_made_is_no_error(
    devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "DIRECTORY", Path("/proc/blockd"))
    links.make("data", devices[0], attached_now=True)
    links.remove("data", devices[0])
