"""Proves that making up for a failed sync keeps what was written and takes no space for holes."""

from __future__ import annotations

import os
from pathlib import Path

from snapshots import distrust
from snapshots.layer import layer_path
from snapshots.replica import Replica
from tests.snapshots.model import Model, kill


def test_what_was_never_written_takes_no_space(tmp_path: Path) -> None:
    model = Model(tmp_path / "r")
    model.write(0, [1])
    model.seal()
    model.write(1, [2])
    paths = [layer_path(str(tmp_path / "r"), layer_id) for layer_id in (1, 2)]
    kill(model.replica)
    before = [os.stat(path).st_blocks for path in paths]
    distrust.mark(str(tmp_path / "r"))
    model.replica = Replica.open(tmp_path / "r")
    assert not distrust.is_marked(str(tmp_path / "r"))
    assert [os.stat(path).st_blocks for path in paths] == before
    model.check()
    model.replica.close()
