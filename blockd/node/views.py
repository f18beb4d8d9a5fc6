"""What the API shows: objects, joined with what the running daemons say this moment.

`VolumeView` is exactly what `blockd volume show -o json` prints.
"""

from __future__ import annotations

import msgspec

from blockd.node import control, local_replicas
from blockd.node.context import Context
from blockd.node.control import Answer
from blockd.node.objects import Mount, Replica, Snapshot, Volume
from blockd.node.reconcile_volumes import daemon_health, record_health, waiting_for
from protocol.errors import BlockdError
from replication.authority import IN_SYNC, OUT, Record

STATUS_SECONDS = 1.0  # a person waits for this answer; an older state is better than none


class RebuildView(msgspec.Struct):
    """How far a rebuild is. `seconds_left` is an estimate, null while there is none."""

    fraction: float
    total_bytes: int
    copied_bytes: int
    seconds_left: float | None


class VerifyView(msgspec.Struct):
    """A verification that runs or has run. Blocks of 4 KiB are counted once per replica that has
    them: bad ones do not match their checksum, differing ones do but are not like the others."""

    running: bool
    layers: int
    checked_blocks: int
    total_blocks: int
    bad_blocks: int
    repaired_blocks: int
    unrepaired_blocks: int
    differing_blocks: int
    seconds: float
    error: str | None
    members: dict[str, int]


class ReplicaView(msgspec.Struct):
    """One copy. `state` is the member state, or NEW before it is a member.

    `address` is `dir:PATH` and `pid` the volume daemon's for a copy that the volume daemon opens.
    """

    id: str
    state: str
    address: str | None
    path: str
    pid: int | None
    connected: bool
    rebuild: RebuildView | None
    allocated_bytes: int
    message: str | None


class SnapshotView(msgspec.Struct):
    """One snapshot; `id` is its layer, `parent` that of the snapshot it was taken on (0: none).

    `frontend`, `device` and `nbd_uri` tell how it is attached, if it is.
    """

    name: str
    volume: str
    id: int | None
    parent: int | None
    created: str | None
    labels: dict[str, str]
    ready: bool
    size_bytes: int
    frontend: str | None
    device: str | None
    nbd_uri: str | None


class SnapshotUsageView(msgspec.Struct):
    """`data_bytes` of data are seen in it; deleting it alone gives `exclusive_bytes` back."""

    data_bytes: int
    exclusive_bytes: int


class UsageView(msgspec.Struct):
    """How much data the volume shows, and each of its snapshots by name. On one replica."""

    data_bytes: int
    snapshots: dict[str, SnapshotUsageView]


class DiffView(msgspec.Struct):
    """Where two views of a volume may differ: [offset, length] in bytes, ascending.

    `next`: the offset from which to ask for the rest; null: that is all.
    """

    extents: list[tuple[int, int]]
    next: int | None


class VolumeView(msgspec.Struct):
    """One volume. `source` is the snapshot it was cloned from, `unsharing_bytes` what a full clone
    has still to copy. `version` and `program` are those of the volume daemon that runs."""

    name: str
    uid: str
    size_bytes: int
    allocated_bytes: int
    block_size: int
    replica_count: int
    rebuild_wait_seconds: float
    rebuild_bandwidth: int | None
    min_in_sync: int
    state: str
    health: str
    frontend: str | None
    device: str | None
    nbd_uri: str | None
    mount: Mount | None
    epoch: int
    pid: int | None
    message: str | None
    created: str
    labels: dict[str, str]
    source: str | None
    unsharing_bytes: int
    replicas: list[ReplicaView]
    snapshots: list[SnapshotView]
    head_parent: int
    verify: VerifyView | None
    version: str | None
    program: str | None


def volume_view(context: Context, volume: Volume) -> VolumeView:
    """A volume as it is now."""
    name, status = volume.metadata.name, volume.status
    record = context.authority.load(volume.metadata.uid)
    answer = _daemon_answer(context, volume)
    items = [item for item in context.replicas_of(name) if item.metadata.deleted is None]
    replicas = [replica_view(item, record, answer) for item in items]
    health = record_health(volume, record, items)
    if answer is not None:
        health = daemon_health(volume, answer)
    elif volume.spec.attached and status.state in ("attached", "error"):
        health = "faulted"
    fs = volume.spec.mount.fs if volume.spec.mount else "unknown"
    source = volume.spec.source
    return VolumeView(
        name=name,
        uid=volume.metadata.uid,
        size_bytes=record.size_bytes if record else volume.spec.size_bytes,
        allocated_bytes=max((item.allocated_bytes for item in replicas), default=0),
        block_size=volume.spec.block_size,
        replica_count=volume.spec.replicas,
        rebuild_wait_seconds=volume.spec.rebuild_wait_seconds,
        rebuild_bandwidth=volume.spec.rebuild_bandwidth,
        min_in_sync=volume.spec.min_in_sync,
        state="removing" if volume.metadata.deleted else status.state,
        health=health,
        frontend=status.frontend,
        device=status.device,
        nbd_uri=status.nbd_uri,
        mount=Mount(status.mount, fs) if status.mount else None,
        epoch=record.epoch if record else 0,
        pid=int(answer["pid"]) if answer else None,
        message=waiting_for(answer or {}) or status.message,
        created=volume.metadata.created,
        labels=volume.metadata.labels,
        replicas=replicas,
        source=f"{source.volume}@{source.snapshot}" if source else None,
        unsharing_bytes=max((item.status.unsharing_bytes for item in items), default=0),
        snapshots=snapshot_views(context, name, record),
        head_parent=_named_ancestor(record, record.head_parent) if record else 0,
        verify=msgspec.convert((answer or {}).get("verify"), VerifyView | None),
        version=str(answer["version"]) if answer else None,
        program=str(answer["program"]) if answer else None,
    )


def snapshot_views(context: Context, volume: str, record: Record | None) -> list[SnapshotView]:
    """The snapshots of a volume that are there, oldest first."""
    return [
        snapshot_view(item, record)
        for item in context.snapshots_of(volume)
        if item.status.ready and item.metadata.deleted is None
    ]


def _named_ancestor(record: Record, layer_id: int) -> int:
    """The layer itself, or the nearest one below it that is a snapshot; 0: there is none."""
    layers = {layer.id: layer for layer in record.layers}
    while layer_id in layers and not layers[layer_id].name:
        layer_id = layers[layer_id].parent
    return layer_id if layer_id in layers else 0


def snapshot_view(item: Snapshot, record: Record | None) -> SnapshotView:
    """One snapshot."""
    layer = record.layer_named(item.spec.name) if record else None
    parent = _named_ancestor(record, layer.parent) if record and layer else item.status.parent
    return SnapshotView(
        name=item.spec.name,
        volume=item.spec.volume,
        id=item.status.layer_id,
        parent=parent,
        created=item.status.created,
        labels=item.metadata.labels,
        ready=item.status.ready,
        size_bytes=item.status.size_bytes,
        frontend=item.status.frontend,
        device=item.status.device,
        nbd_uri=item.status.nbd_uri,
    )


def replica_view(item: Replica, record: Record | None, answer: Answer | None) -> ReplicaView:
    """One replica, joined with what record and volume daemon say of it."""
    uid = item.metadata.name
    member = record.members.get(uid) if record else None
    said = {m["replica_uuid"]: m for m in (answer or {}).get("members", [])}.get(uid, {})
    state = said.get("state") or (member.state if member else "NEW")
    if state == IN_SYNC and not said and item.status.state == "failed":
        state = OUT  # the volume daemon will find that out; a person should not have to
    pid = item.status.pid
    if local_replicas.is_local(item):
        pid = int(answer["pid"]) if answer and said.get("connected") else None
    elif pid is not None and not _is_alive(pid):
        pid = None
    return ReplicaView(
        id=uid,
        state=state,
        address=item.status.address,
        path=item.spec.path,
        pid=pid,
        connected=bool(said.get("connected", False)),
        rebuild=msgspec.convert(said.get("rebuild"), RebuildView | None),
        allocated_bytes=item.status.allocated_bytes,
        message=item.status.message or (None if state == IN_SYNC else said.get("failure") or None),
    )


def _daemon_answer(context: Context, volume: Volume) -> Answer | None:
    """The status of the volume daemon, None if none answers."""
    if not (volume.spec.attached or volume.status.pid):
        return None
    spec = context.volume_daemon(volume, [])
    if not spec.control.exists():
        return None
    try:
        answer = control.status(spec.control, STATUS_SECONDS)
    except BlockdError:
        return None
    return answer if answer.get("volume_uuid") == volume.metadata.uid else None


def _is_alive(pid: int) -> bool:
    """Cheap and not exact: a zombie is not alive, a reused pid is."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
