"""Fixtures of the tests of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blockd.node_harness import NodeHarness


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    """A node service with real daemons; everything is stopped afterwards."""
    harness = NodeHarness(tmp_path / "home")
    yield harness
    harness.close()
