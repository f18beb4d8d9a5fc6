"""The objects of the control plane: what the user wants (`spec`) and what is (`status`).

The same types are the rows of the store and the bodies a cluster's API server would keep. Doors
(API, command line) write specs; reconcilers write statuses; nobody writes the other's half.

An action, such as a revert, is a request in the spec with an id of its own; it is done when the
status names that id. So it survives a crash in between and is never done twice.

Invariants: `metadata.generation` grows with every change of a spec; `status.observed_generation`
is the newest generation a reconciler has finished a pass over; an object with `deleted` set only
waits for its finalizers.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import ClassVar

import msgspec

from protocol.errors import BlockdError

REPLICAS_DEFAULT = 3
BLOCK_SIZES = (4096, 512)  # bytes; what file systems and databases can ask of a device
REBUILD_WAIT_SECONDS = 60.0  # the restart of a machine should not cost a full copy


def new_uid() -> str:
    """A fresh unique id."""
    return str(uuid.uuid4())


def utc_now() -> str:
    """This moment, in ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Metadata(msgspec.Struct):
    """What every object has. The store fills in everything but name, labels and finalizers."""

    name: str
    uid: str = ""
    resource_version: int = 0
    generation: int = 0
    labels: dict[str, str] = {}
    finalizers: list[str] = []
    created: str = ""
    deleted: str | None = None


class Problem(msgspec.Struct):
    """Why the last pass did not reach the spec; `retry` tells whether waiting may help."""

    code: str
    message: str
    retry: bool = False

    @classmethod
    def of(cls, error: BlockdError) -> Problem:
        """What an error says."""
        return cls(error.code, str(error), error.retry)


class Mount(msgspec.Struct):
    """Where a file system is mounted, and which one a blank volume gets."""

    path: str
    fs: str = "ext4"


class Revert(msgspec.Struct):
    """One request to go back to a snapshot."""

    id: str
    snapshot: str
    force: bool = False


class Upgrade(msgspec.Struct):
    """One request to run the daemons of a volume with `program`, the Python of an installation of
    blockd; null is the node service's own."""

    id: str
    program: str | None = None


class Source(msgspec.Struct):
    """The snapshot a volume is cloned from, and the size of that volume then.

    `full`: in the end it shares nothing with it.
    """

    volume: str
    snapshot: str
    size_bytes: int
    full: bool = False


class VolumeSpec(msgspec.Struct):
    """What the user wants of a volume. `size_bytes` can only grow.

    A replica that was lost for `rebuild_wait_seconds` is replaced by a new one. `rebuild_bandwidth`
    caps what is copied to one replica, in bytes per second. Writes are answered only while
    `min_in_sync` replicas are in sync.
    """

    size_bytes: int
    replicas: int = REPLICAS_DEFAULT
    block_size: int = 4096
    attached: bool = False
    frontend: str = "auto"
    mount: Mount | None = None
    rebuild_wait_seconds: float = REBUILD_WAIT_SECONDS
    rebuild_bandwidth: int | None = None
    min_in_sync: int = 1
    revert: Revert | None = None
    upgrade: Upgrade | None = None
    source: Source | None = None


class VolumeStatus(msgspec.Struct):
    """What a volume is.

    `cloned`: the replicas of a clone are made, it is established next.
    `program` is that of the last upgrade that went well.
    `mount` is the path this service mounted, until it unmounts it; `short_since` is when it began
    to have fewer replicas than wanted.
    """

    state: str = "new"
    health: str = "unknown"
    established: bool = False
    cloned: bool = False
    epoch: int = 0
    frontend: str | None = None
    device: str | None = None
    nbd_uri: str | None = None
    mount: str | None = None
    message: str | None = None
    allocated_bytes: int = 0
    pid: int | None = None
    fenced: bool = False
    short_since: str | None = None
    revert_id: str | None = None
    revert_problem: Problem | None = None
    upgrade_id: str | None = None
    upgrade_problem: Problem | None = None
    program: str | None = None
    observed_generation: int = 0
    problem: Problem | None = None


class Volume(msgspec.Struct):
    """What the user has: a name, a size, a replica count."""

    kind: ClassVar[str] = "Volume"
    metadata: Metadata
    spec: VolumeSpec
    status: VolumeStatus = msgspec.field(default_factory=VolumeStatus)


class ReplicaSpec(msgspec.Struct):
    """One copy: of which volume, where. `rebuild_id` asks for a rebuild now.

    `source` is the replica of another volume that it is cloned from.
    """

    volume: str
    node: str
    disk: str
    path: str
    rebuild_id: str | None = None
    source: str | None = None


class ReplicaStatus(msgspec.Struct):
    """What a replica is.

    `state`: "running" if it can be used (its daemon runs, or the volume daemon has its directory
    or can open it), "failed" if not. `provisioned`: its directory was made once, so a missing
    directory is a loss and never a reason to make a blank one. `failed_since` is an ISO time.
    `unsharing_bytes`: what a full clone has still to copy.
    """

    state: str = "new"
    provisioned: bool = False
    address: str | None = None
    pid: int | None = None
    allocated_bytes: int = 0
    unsharing_bytes: int = 0
    message: str | None = None
    failed_since: str | None = None
    rebuild_id: str | None = None


class Replica(msgspec.Struct):
    """One full copy of a volume in one directory; its name is the replica UUID."""

    kind: ClassVar[str] = "Replica"
    metadata: Metadata
    spec: ReplicaSpec
    status: ReplicaStatus = msgspec.field(default_factory=ReplicaStatus)


class SnapshotSpec(msgspec.Struct):
    """Which volume, and the snapshot's name there; `freeze`: with its file system frozen.

    `attached`: it has a read-only device or NBD address of its own, through `frontend`.
    """

    volume: str
    name: str
    freeze: bool = False
    attached: bool = False
    frontend: str = "auto"


class SnapshotStatus(msgspec.Struct):
    """What a snapshot is; `layer_id` and `parent` are the layer's.

    `frontend` is the one it is attached through; `problem` says why it could not be made, removed,
    attached or detached. `observed_generation`: the spec it is attached or detached for.
    """

    ready: bool = False
    created: str | None = None
    layer_id: int | None = None
    parent: int | None = None
    size_bytes: int = 0
    frontend: str | None = None
    device: str | None = None
    nbd_uri: str | None = None
    observed_generation: int = 0
    problem: Problem | None = None


class Snapshot(msgspec.Struct):
    """A sealed layer the user named; its name is VOLUME@NAME."""

    kind: ClassVar[str] = "Snapshot"
    metadata: Metadata
    spec: SnapshotSpec
    status: SnapshotStatus = msgspec.field(default_factory=SnapshotStatus)


class NodeSpec(msgspec.Struct):
    """What the user wants of a node."""

    schedulable: bool = True


class NodeStatus(msgspec.Struct):
    """What a node is. `front_ends` maps each one's name to why it cannot be used, or null.

    `boot_id`: the boot of the kernel in which the node service ran last.
    """

    version: str = ""
    pid: int = 0
    started: str = ""
    front_ends: dict[str, str | None] = {}
    boot_id: str = ""


class Node(msgspec.Struct):
    """A host that runs the node service."""

    kind: ClassVar[str] = "Node"
    metadata: Metadata
    spec: NodeSpec = msgspec.field(default_factory=NodeSpec)
    status: NodeStatus = msgspec.field(default_factory=NodeStatus)


class DiskSpec(msgspec.Struct):
    """A directory on a node that may hold replicas."""

    node: str
    path: str
    schedulable: bool = True


class DiskStatus(msgspec.Struct):
    """Space of the file system that holds the directory."""

    total_bytes: int = 0
    free_bytes: int = 0


class Disk(msgspec.Struct):
    """A directory or file system on a node that may hold replicas."""

    kind: ClassVar[str] = "Disk"
    metadata: Metadata
    spec: DiskSpec
    status: DiskStatus = msgspec.field(default_factory=DiskStatus)


Object = Volume | Replica | Snapshot | Node | Disk


def snapshot_key(volume: str, name: str) -> str:
    """The object name of a snapshot."""
    return f"{volume}@{name}"
