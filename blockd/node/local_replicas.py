"""The only replica of a volume: a directory that the volume daemon opens itself, no daemon of its
own (docs/decisions/local-replica.md).

Which it is, is decided while no volume daemon runs, and holds as long as one runs: an address
`dir:PATH` in the replica's status. It is written down before a volume daemon is started with it,
so a node service that starts anew decides the same. A directory has one owner:

- the replica daemon is stopped before `dir:PATH` is written down;
- a volume daemon keeps the directory it opened until it ends, also when a second replica is added;
  that one gets a daemon. The next volume daemon finds two replicas, so both get daemons.

The directory is made here once, before the volume has a record. Missing later, it is a failed
replica.
"""

from __future__ import annotations

import os
from pathlib import Path

from blockd.node.control import Answer
from blockd.node.objects import Replica, ReplicaStatus, Volume, utc_now
from protocol.errors import BlockdError, ConflictError, StorageError
from replication.authority import Record
from snapshots.cloning import unsharing_bytes
from snapshots.metadata import FILE_NAME, MetadataFile
from snapshots.replica import Replica as ReplicaDirectory

ADDRESS_PREFIX = "dir:"


def local_address(replica: Replica) -> str:
    """The address of a replica inside the volume daemon."""
    return ADDRESS_PREFIX + replica.spec.path


def is_local(replica: Replica) -> bool:
    """True if the volume daemon opens the directory itself."""
    return (replica.status.address or "").startswith(ADDRESS_PREFIX)


def make_directory(volume: Volume, replica: Replica, record: Record | None) -> None:
    """Make the directory of a new volume's replica; never twice."""
    if replica.status.provisioned:
        return
    path = Path(replica.spec.path)
    if record is not None or volume.status.established:
        raise StorageError(f"replica {replica.metadata.name} was never made; remove it")
    if (path / FILE_NAME).exists():
        return  # made just before a crash kept that from being written down
    try:
        if path.is_dir():  # begun before such a crash; nothing was ever written to it
            for left in sorted(path.rglob("*"), reverse=True):
                left.rmdir() if left.is_dir() else left.unlink()
    except OSError as error:
        raise StorageError(f"directory {path} cannot be emptied: {error.strerror}") from error
    ReplicaDirectory.create(
        path,
        size_bytes=volume.spec.size_bytes,
        replica_uuid=replica.metadata.name,
        volume_uuid=volume.metadata.uid,
        volume_name=volume.metadata.name,
    )


def check_directory(replica: Replica) -> None:
    """Raise unless the directory is there and holds this replica; nobody has it open."""
    found = MetadataFile(replica.spec.path).read().replica_uuid
    if found != replica.metadata.name:
        raise ConflictError(
            f"{replica.spec.path} holds replica {found}, not {replica.metadata.name}; "
            "put the right directory back"
        )


def allocated_bytes(path: str) -> int:
    """Disk space of all files of a replica directory; of those of several its part."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                found = os.lstat(os.path.join(directory, name))
                total += found.st_blocks * 512 // found.st_nlink
            except FileNotFoundError:
                continue
    return total


def member_of(replica: Replica, daemon: Answer | None) -> Answer | None:
    """What the volume daemon says of the replica it has opened, None if it does not run."""
    members = (daemon or {}).get("members", [])
    uid = replica.metadata.name
    return next((member for member in members if member["replica_uuid"] == uid), None)


def unsharing_left(replica: Replica) -> int:
    """What a full clone has still to copy; what was known last if its directory cannot be read."""
    path = replica.spec.path
    try:
        return unsharing_bytes(path, MetadataFile(path).read())
    except (BlockdError, OSError):  # the volume daemon says what is wrong
        return replica.status.unsharing_bytes


def note_usable(
    status: ReplicaStatus, address: str, path: str, member: Answer | None, unsharing: int
) -> None:
    """The replica is open in the volume daemon (`member`), or can be opened."""
    status.address, status.pid = address, None  # the volume daemon's pid is the volume's
    status.provisioned, status.failed_since = True, None
    status.allocated_bytes = allocated_bytes(path)
    status.unsharing_bytes = unsharing
    status.state, status.message = "running", None
    if member is not None and not member.get("connected"):
        reason = member.get("failure") or "its disk failed"
        status.state = "failed"
        status.message = f"{reason}; it is opened again when the volume is detached and attached"


def note_unusable(status: ReplicaStatus, address: str, error: BlockdError) -> None:
    """The directory cannot be used."""
    status.address, status.pid = address, None
    status.state, status.message = "failed", str(error)
    status.failed_since = status.failed_since or utc_now()
