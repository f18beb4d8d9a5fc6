"""Proves that real daemons lose nothing, whatever is done: the short form of `make torture`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.torture.__main__ import run

ROUNDS = 10
SEED = 7


def test_ten_rounds_lose_nothing() -> None:
    directory = Path(tempfile.mkdtemp(prefix="torture-"))  # unix socket paths are short
    said: list[str] = []
    run(ROUNDS, SEED, directory, said.append)
    assert len(said) == ROUNDS
    shutil.rmtree(directory)
