"""Once a replica is closed, or has failed to change hands, its directory is left alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import StateError, StorageError
from snapshots import store
from snapshots.replica import Replica
from tests.snapshots.equalize import tree_of
from tests.snapshots.model import Model, write

CALLS: list[Callable[[Replica], Any]] = [
    lambda replica: replica.promise(9),
    lambda replica: replica.commit(replica.metadata),
    lambda replica: replica.flush_begin(),
    lambda replica: replica.maintain(),
    lambda replica: write(replica, 5, [2]),
    lambda replica: write(replica, 5, [2, 3]),
    lambda replica: replica.zero(5, 1),
    lambda replica: replica.seal(9, "s9", "", {}),
    lambda replica: replica.revert(1, 9),
    lambda replica: replica.begin_sync(tree_of(replica), 2, "v", "v", 1 << 20),
]


@pytest.mark.parametrize("clean", [True, False])
def test_a_closed_replica_refuses_every_change(clean: bool, tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.write(5, [1])
    model.seal()
    model.write(5, [1, 1])
    replica = model.replica
    replica.flush()
    job = replica.flush_begin()
    (replica.close if clean else replica.abandon)()
    model.replica = Replica.open(model.path)
    before = {path: path.stat() for path in model.path.rglob("*")}
    for call in CALLS:
        with pytest.raises(StateError):
            call(replica)
    replica.flush_end(job)
    for path, stat in before.items():
        assert path.stat().st_mtime_ns == stat.st_mtime_ns, path
    model.check()


@pytest.mark.parametrize("what", ["LayerFile", "ZeroedMarks"])
@pytest.mark.parametrize("call", [Model.seal, lambda model: model.revert(1)])
def test_a_new_head_that_cannot_be_opened_changes_nothing(
    call: Callable[[Model], Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "replica")
    model.write(5, [1])
    model.seal()
    model.write(6, [2])
    model.replica.flush()

    def refused(*_: Any) -> None:
        raise StorageError("too many open files", errno=errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(store, what, refused)
        with pytest.raises(StorageError, match="too many"):
            call(model)
    assert sorted(os.listdir(model.path / "layers")) == ["1.layer", "2.layer"]
    model.write(7, [3])
    model.check()
    model.next_id = 3
    call(model)
    model.check()
    model.crash()
    model.check()
