"""Fixtures of the tests of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.cli import main
from tests.blockd.cli_fake_node import Run
from tests.blockd.node_harness import NodeHarness


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    """A node service with real daemons; everything is stopped afterwards."""
    harness = NodeHarness(tmp_path / "home")
    yield harness
    harness.close()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`blockd WORDS` with the test's directory as its home: exit code, stdout, stderr."""

    def run_blockd(*words: str) -> tuple[int, str, str]:
        code = main(["--home", str(tmp_path), *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_blockd
