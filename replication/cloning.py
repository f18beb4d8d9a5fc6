"""Clones: members of a volume share a snapshot's layers with the replicas of a new volume.

Each member in sync that is asked makes one replica in a directory of its own file system
(snapshots/cloning.py). A snapshot is the same on all members and never changes, so nothing has to
happen at one point of the order, and asking again after a death finds what was made. All or
nothing: on an error the caller removes the directories. No snapshot is deleted meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError, RequestError, StateError
from replication.authority import IN_SYNC
from replication.turns import Done

if TYPE_CHECKING:
    from replication.link import Link
    from replication.structure import Structure


@dataclass(frozen=True)
class Order:
    """The volume to make: `targets` maps members of this one to (replica uuid, path) of its own."""

    snapshot: str
    volume_uuid: str
    volume_name: str
    size_bytes: int
    targets: Mapping[str, tuple[str, str]]
    unshare: bool


def clone(structure: Structure, order: Order, done: Done) -> None:
    """Have every member that is named in `order` make its replica."""
    if not order.targets:
        raise RequestError(f"volume {order.volume_name} needs at least one replica; name some")
    structure.engine.changes.take(lambda end: _clone(structure, order, end), done)


def _clone(structure: Structure, order: Order, done: Done) -> None:
    engine, layer = structure.engine, structure.find(order.snapshot)
    record = engine.record
    if order.size_bytes < record.size_bytes:
        raise RequestError(
            f"clone {order.volume_name} of {order.size_bytes} bytes is smaller than volume "
            f"{record.volume_name}, which has {record.size_bytes}; grow it after it was made"
        )
    links = [_member(structure, replica_uuid) for replica_uuid in order.targets]
    left, failure = len(links), None

    def answered(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
        nonlocal left, failure
        left -= 1
        failure = failure or error
        if not left:
            done(failure)

    for link in links:
        target_uuid, path = order.targets[link.replica_uuid]
        content: dict[str, Any] = {
            "do": "clone",
            "layer_id": layer.id,
            "new_head_id": layer.id + 1,  # above those below it, and the same at every attempt
            "path": path,
            "replica_uuid": target_uuid,
            "volume_uuid": order.volume_uuid,
            "volume_name": order.volume_name,
            "size_bytes": order.size_bytes,
            "unshare": order.unshare,
        }
        engine.call(link, wire.CONTROL, answered, content=content)


def _member(structure: Structure, replica_uuid: str) -> Link:
    link = structure.engine.links.get(replica_uuid)
    if link is None or link.state != IN_SYNC or link not in structure.engine.targets:
        raise StateError(
            f"replica {replica_uuid} of volume {structure.engine.record.volume_name} is not in "
            "sync and cannot be cloned; name others, or try again when it is"
        )
    return link
