"""Proves that what is left of a snapshot that did not happen goes from every member, also if one of
them has folded its layer already because an earlier owner died while it cleaned up.
"""

from __future__ import annotations

from typing import Any, cast

from blockd.daemons import opening
from protocol import replica as wire
from replication.authority import IN_SYNC, LayerRecord, Member, Record


class Asked:
    """A session that only notes what is asked."""

    def __init__(self) -> None:
        self.removed: list[int] = []

    def ask(self, operation: int, content: dict[str, Any]) -> dict[str, Any]:
        if operation == wire.CONTROL and content["do"] == "remove":
            self.removed.append(content["layer_id"])
        return {"layers": []}


def layer(layer_id: int, parent: int, *, removed: bool = False) -> dict[str, Any]:
    return {"id": layer_id, "parent": parent, "name": "", "removed": removed}


def test_a_layer_that_one_member_has_folded_is_removed_from_the_others() -> None:
    members = {name: Member(IN_SYNC, name) for name in ("r1", "r2", "r3")}
    known = LayerRecord(1, 0, "s1")
    record = Record("v", "vol", 1 << 20, members, layers=(known,), head_id=2, head_parent=1)
    promised = {
        "r1": {"head_id": 3, "layers": [layer(1, 0), layer(3, 1)]},  # folded
        "r2": {"head_id": 3, "layers": [layer(1, 0), layer(2, 1, removed=True), layer(3, 2)]},
        "r3": {"head_id": 3, "layers": [layer(1, 0), layer(2, 1), layer(3, 2)]},
    }
    sessions = {name: Asked() for name in members}
    found = opening._finish_structure(
        record, cast(Any, sessions), promised, list(members), lambda message: None
    )
    assert found.head_id == 3
    assert {(one.id, one.removed) for one in found.layers} == {(1, False), (2, True)}
    assert {name: session.removed for name, session in sessions.items()} == {
        "r1": [],
        "r2": [],
        "r3": [2],
    }
