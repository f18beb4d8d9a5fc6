"""Snapshots: each object becomes a sealed layer, each deleted object's layer goes.

The volume daemon knows what is; a snapshot it has under the wanted name is this object's, made
just before a crash kept that from being written down.

A snapshot of a mounted volume holds what was written to files before it was asked for: the file
system is written back first. Its journal makes the snapshot as good as a disk after a power cut. If
asked for, it is frozen besides (freeze.py): then the snapshot is as good as an unmounted one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from blockd.node import control, mounts
from blockd.node.context import SNAPSHOT_FINALIZER, Context, log
from blockd.node.control import Answer
from blockd.node.freeze import frozen
from blockd.node.objects import (
    Metadata,
    Problem,
    Snapshot,
    SnapshotSpec,
    Volume,
    snapshot_key,
)
from blockd.node.reconcile_devices import server_of
from blockd.node.store import find, modify, modify_status
from blockd.node.supervisor import DaemonSpec
from protocol.errors import BlockdError, ConflictError, NotFoundError


class SnapshotReconciler:
    """Snapshots of one volume after another."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def pending(self, volume: str) -> bool:
        """True if a snapshot waits to be made or removed."""
        return any(_waits(item) for item in self._context.snapshots_of(volume))

    def reconcile(self, volume: Volume, daemon: DaemonSpec) -> None:
        """Make and remove what waits, and take over what the daemon has beyond that."""
        name = volume.metadata.name
        there = _by_name(control.status(daemon.control))
        items = self._context.snapshots_of(name)
        known = {item.spec.name for item in items}
        for left in there.values():
            if left["name"] not in known:
                self._take_over(volume, left)
        for item in items:
            if item.metadata.deleted is not None:
                self._remove(item, there, daemon)
            elif _waits(item):
                self._make(item, there.get(item.spec.name), daemon, volume)

    def forget_all(self, volume: str) -> None:
        """The volume goes, and its layers with it."""
        for item in self._context.snapshots_of(volume):
            self._context.store.delete(Snapshot, item.metadata.name)
            if find(self._context.store, Snapshot, item.metadata.name) is not None:
                modify(self._context.store, Snapshot, item.metadata.name, _drop_finalizer)

    def _make(
        self, item: Snapshot, there: Answer | None, daemon: DaemonSpec, volume: Volume
    ) -> None:
        store, key = self._context.store, item.metadata.name
        try:
            if there is None and volume.status.device is not None:
                mounts.write_back(volume.status.device, server_of(volume))
            made = there or _create(item, daemon, volume)
        except BlockdError as error:
            problem = Problem.of(error)
            log.warning("snapshot %s: %s", key, error)
            modify_status(store, Snapshot, key, lambda s: setattr(s.status, "problem", problem))
            return
        log.info("snapshot %s: made", key)
        size_bytes = volume.spec.size_bytes
        modify_status(store, Snapshot, key, lambda s: _ready(s, made, size_bytes))

    def _remove(self, item: Snapshot, there: dict[str, Answer], daemon: DaemonSpec) -> None:
        store, key = self._context.store, item.metadata.name
        if item.spec.name in there:
            try:
                control.ask(daemon.control, "snapshot-remove", name=item.spec.name)
            except NotFoundError:
                pass
            except BlockdError as error:
                problem = Problem.of(error)
                log.warning("snapshot %s: %s", key, error)
                modify_status(store, Snapshot, key, lambda s: setattr(s.status, "problem", problem))
                return
        log.info("snapshot %s: removed", key)
        modify(store, Snapshot, key, _drop_finalizer)

    def _take_over(self, volume: Volume, there: Answer) -> None:
        """A snapshot made past the node service gets an object."""
        key = snapshot_key(volume.metadata.name, there["name"])
        self._context.store.create(
            Snapshot(
                metadata=Metadata(
                    name=key,
                    labels=dict(there.get("labels") or {}),
                    finalizers=[SNAPSHOT_FINALIZER],
                ),
                spec=SnapshotSpec(volume.metadata.name, there["name"]),
            )
        )
        size_bytes = volume.spec.size_bytes
        modify_status(self._context.store, Snapshot, key, lambda s: _ready(s, there, size_bytes))


def _create(item: Snapshot, daemon: DaemonSpec, volume: Volume) -> Answer:
    """Have the volume daemon make it; a frozen one that was not frozen to the end goes again."""
    name, made = item.spec.name, False
    try:
        with _frozen(item, volume):
            answer = control.ask(
                daemon.control, "snapshot-create", name=name, labels=item.metadata.labels
            )
            made = True
    except BlockdError:
        if made:
            control.ask(daemon.control, "snapshot-remove", name=name)
        raise
    snapshot: Answer = answer["snapshot"]
    return snapshot


def _frozen(item: Snapshot, volume: Volume) -> AbstractContextManager[None]:
    if not item.spec.freeze:
        return nullcontext()
    return frozen(mount_to_freeze(volume))


def mount_to_freeze(volume: Volume) -> str:
    """Where blockd has mounted the volume, or ConflictError."""
    if volume.status.mount is None:
        name = volume.metadata.name
        raise ConflictError(
            f"volume {name} is not mounted by blockd, so there is no file system to freeze; mount "
            f"it (`blockd volume mount {name}`), or take the snapshot without --freeze"
        )
    return volume.status.mount


def mounted_error(volume: Volume) -> ConflictError:
    """Why a volume is not reverted: whoever uses the file system would see it change."""
    name = volume.metadata.name
    return ConflictError(
        f"volume {name} is mounted at {volume.status.mount}; unmount it first (`blockd volume "
        f"umount {name}`), or use --force-unmount: it is unmounted, reverted and mounted again"
    )


def _waits(item: Snapshot) -> bool:
    if item.metadata.deleted is not None:
        return True
    problem = item.status.problem
    return not item.status.ready and (problem is None or problem.retry)


def _by_name(status: Answer) -> dict[str, Answer]:
    return {item["name"]: item for item in status["snapshots"] if item["name"]}


def _ready(item: Snapshot, made: Answer, size_bytes: int) -> None:
    status = item.status
    status.ready, status.problem = True, None
    status.created = made.get("created")
    status.layer_id = made.get("id")
    status.parent = made.get("parent")
    status.size_bytes = size_bytes


def _drop_finalizer(item: Snapshot) -> None:
    item.metadata.finalizers = []
