"""What the doors ask for about snapshots."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from blockd.node import control
from blockd.node.context import SNAPSHOT_FINALIZER
from blockd.node.objects import (
    Metadata,
    Revert,
    Snapshot,
    SnapshotSpec,
    SnapshotStatus,
    Volume,
    new_uid,
    snapshot_key,
)
from blockd.node.operations_common import (
    POLL_SECONDS,
    OperationsCommon,
    check_attaching,
    refuse,
    refuse_if_final,
)
from blockd.node.reconcile_snapshots import mount_to_freeze, mounted_error
from blockd.node.store import find, modify
from blockd.node.views import DiffView, SnapshotView, UsageView, VolumeView, snapshot_view
from protocol.errors import ConflictError, DeadlineError, NotFoundError
from protocol.units import SNAPSHOTS_MAX, check_name

Labels = dict[str, str]


class SnapshotOperations(OperationsCommon):
    """The verbs of the API about snapshots."""

    def snapshot(self, volume: str, name: str) -> SnapshotView:
        """One snapshot that is there."""
        self._volume(volume)
        item = find(self._store, Snapshot, snapshot_key(volume, name))
        if item is None or not item.status.ready:
            raise NotFoundError(
                f"snapshot {volume}@{name} does not exist; see `blockd snapshot ls {volume}`"
            )
        return snapshot_view(item, self._record(volume))

    def snapshot_create(
        self, volume: str, name: str, labels: Labels, wait_seconds: float, freeze: bool = False
    ) -> SnapshotView:
        """A new snapshot; durable when this returns after a wait."""
        found = self._volume(volume)
        if freeze:
            mount_to_freeze(found)
        check_name("snapshot", name)
        key = snapshot_key(volume, name)
        count = len(self._context.snapshots_of(volume))
        if count >= SNAPSHOTS_MAX and find(self._store, Snapshot, key) is None:
            raise ConflictError(
                f"volume {volume} has {count} snapshots, the limit is {SNAPSHOTS_MAX}; remove "
                f"one first: `blockd snapshot rm {volume}@NAME`"
            )
        metadata = Metadata(name=key, labels=labels, finalizers=[SNAPSHOT_FINALIZER])
        item = self._store.create(
            Snapshot(metadata=metadata, spec=SnapshotSpec(volume, name, freeze))
        )
        deadline = time.monotonic() + wait_seconds
        while wait_seconds > 0 and not item.status.ready:
            problem = item.status.problem
            if problem is not None and not problem.retry:
                self._store.delete(Snapshot, key)
                refuse_if_final(problem)
            if time.monotonic() > deadline:
                reason = problem or self._volume(volume).status.problem
                raise DeadlineError(
                    f"snapshot {key} is not made after {wait_seconds:g} s and still wanted"
                    + (f": {reason.message}" if reason else "")
                )
            time.sleep(POLL_SECONDS)
            item = self._store.get(Snapshot, key)
        return snapshot_view(item, self._record(volume))

    def snapshot_attach(
        self, volume: str, name: str, frontend: str, wait_seconds: float
    ) -> SnapshotView:
        """Give a snapshot a read-only device, or an NBD address, of its own."""
        self.snapshot(volume, name)
        key = snapshot_key(volume, name)
        item = self._store.get(Snapshot, key)
        check_attaching(f"snapshot {key}", item.spec.attached, item.status.frontend, frontend)

        def want(snapshot: Snapshot) -> None:
            snapshot.spec.attached = True
            snapshot.spec.frontend = frontend if not item.spec.attached else item.spec.frontend

        wanted = modify(self._store, Snapshot, key, want)
        undo = _want_detached if not item.spec.attached else None
        self._await_snapshot(
            wanted, lambda s: s.nbd_uri is not None, wait_seconds, "attached", undo
        )
        return self.snapshot(volume, name)

    def snapshot_detach(self, volume: str, name: str, wait_seconds: float) -> SnapshotView:
        """Take a snapshot's device down; refused while something uses it."""
        self.snapshot(volume, name)
        key = snapshot_key(volume, name)
        was_attached = self._store.get(Snapshot, key).spec.attached
        wanted = modify(self._store, Snapshot, key, _want_detached)

        def undo(snapshot: Snapshot) -> None:
            snapshot.spec.attached = was_attached

        self._await_snapshot(wanted, lambda s: s.frontend is None, wait_seconds, "detached", undo)
        return self.snapshot(volume, name)

    def _await_snapshot(
        self,
        wanted: Snapshot,
        done: Callable[[SnapshotStatus], bool],
        wait_seconds: float,
        what: str,
        undo: Callable[[Snapshot], None] | None,
    ) -> None:
        """Wait until `done`; a problem that waiting cannot solve is raised, after `undo`."""
        key, deadline = wanted.metadata.name, time.monotonic() + wait_seconds
        while wait_seconds > 0:
            status = self._store.get(Snapshot, key).status
            settled = status.observed_generation >= wanted.metadata.generation
            if settled and done(status):
                return
            if settled and status.problem is not None and not status.problem.retry:
                if undo is not None:
                    modify(self._store, Snapshot, key, undo)
                refuse_if_final(status.problem)
            if time.monotonic() > deadline:
                reason = f": {status.problem.message}" if status.problem else ""
                raise DeadlineError(
                    f"snapshot {key} is not {what} after {wait_seconds:g} s and still wanted"
                    + reason
                )
            time.sleep(POLL_SECONDS)

    def snapshot_remove(self, volume: str, name: str, wait_seconds: float) -> None:
        """Remove a snapshot."""
        self.snapshot(volume, name)
        key = snapshot_key(volume, name)
        item = self._store.get(Snapshot, key)
        if item.spec.attached:
            raise attached_error(item, "snapshot " + key)
        self._store.delete(Snapshot, key)
        deadline = time.monotonic() + wait_seconds
        while wait_seconds > 0 and (left := find(self._store, Snapshot, key)) is not None:
            if left.metadata.deleted is None:
                return  # a new one of the same name
            refuse_if_final(left.status.problem)
            if time.monotonic() > deadline:
                raise DeadlineError(f"snapshot {key} is not removed after {wait_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def revert(self, volume: str, name: str, force: bool, wait_seconds: float) -> VolumeView:
        """Give a volume the content of a snapshot."""
        item = self._volume(volume)
        self.snapshot(volume, name)
        if item.status.mount is not None and not force:
            raise mounted_error(item)
        revert = Revert(id=new_uid(), snapshot=name, force=force)
        wanted = modify(self._store, Volume, volume, lambda v: setattr(v.spec, "revert", revert))

        def done(item: Volume) -> bool:
            if item.status.revert_id != revert.id:
                return False
            refuse(item.status.revert_problem)
            settled = item.status.observed_generation >= wanted.metadata.generation
            return settled and item.status.problem is None

        self._await(wanted, done, wait_seconds, f"reverted to {name}")
        return self.volume(volume)

    def snapshot_diff(self, volume: str, base: str, to: str, offset: int) -> DiffView:
        """Where the volume (`to` empty) or a snapshot may differ from snapshot `base`."""
        for name in (base, to) if to else (base,):
            self.snapshot(volume, name)
        daemon = self._running_daemon(volume, "compares snapshots")
        answer = control.ask(daemon.control, "diff", base=base, snapshot=to, offset=offset)
        return msgspec.convert({"extents": answer["extents"], "next": answer["next"]}, DiffView)

    def usage(self, volume: str, wait_seconds: float) -> UsageView:
        """How much data the volume and its snapshots show and hold; all maps are read for it."""
        path = self._running_daemon(volume, "counts data").control
        return msgspec.convert(control.ask(path, "usage", timeout_seconds=wait_seconds), UsageView)


def attached_error(item: Snapshot, what: str) -> ConflictError:
    """Why something cannot be removed."""
    key = item.metadata.name
    return ConflictError(
        f"{what} cannot be removed: snapshot {key} is attached; detach it first "
        f"(`blockd snapshot detach {key}`)"
    )


def _want_detached(item: Snapshot) -> None:
    item.spec.attached = False
