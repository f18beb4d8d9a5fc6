"""What the doors ask for: check, write the spec, wait for the status.

Every function returns the object's view once what was asked for is so, and raises an error family
otherwise. With `wait_seconds` 0 it returns at once after the spec is written. When a wish is
refused for good while someone waits for it (busy device, missing program), it is taken back, so
that it does not come true by surprise later.
"""

from __future__ import annotations

import time
from typing import Any

from blockd.node import control, mounts
from blockd.node.checks import check_path, check_program, check_range, check_settings
from blockd.node.context import VOLUME_FINALIZER
from blockd.node.objects import (
    BLOCK_SIZES,
    Metadata,
    Mount,
    Replica,
    Upgrade,
    Volume,
    VolumeSpec,
    new_uid,
)
from blockd.node.operations_common import (
    POLL_SECONDS,
    check_attaching,
    late,
    refuse,
    refuse_if_final,
)
from blockd.node.reconcile_devices import no_device_text
from blockd.node.snapshot_operations import SnapshotOperations, attached_error
from blockd.node.store import find, modify
from blockd.node.views import (
    ReplicaView,
    VolumeView,
    volume_view,
)
from protocol.errors import ConflictError, DeadlineError, NotFoundError, RequestError
from protocol.units import REPLICAS_MAX, check_name, check_size
from replication.authority import IN_SYNC


class Operations(SnapshotOperations):
    """The verbs of the API."""

    # -- volumes --------------------------------------------------------------------------------

    def volumes(self) -> list[VolumeView]:
        """All volumes."""
        return [volume_view(self._context, item) for item in self._store.list(Volume)]

    def create(
        self, name: str, spec: VolumeSpec, labels: dict[str, str], wait_seconds: float
    ) -> VolumeView:
        """A new, detached volume."""
        check_name("volume", name)
        check_size(spec.size_bytes)
        check_range("replicas", spec.replicas, 1, REPLICAS_MAX)
        check_settings(spec)
        if spec.block_size not in BLOCK_SIZES:
            raise RequestError(f"block size {spec.block_size} is not supported; choose 4096 or 512")
        metadata = Metadata(name=name, labels=labels, finalizers=[VOLUME_FINALIZER])
        made = self._store.create(Volume(metadata=metadata, spec=spec))
        if wait_seconds > 0:
            try:
                self._await(made, self._has_its_size, wait_seconds, "created")
            except DeadlineError:
                raise
            except Exception:
                self._store.delete(Volume, name)
                raise
        return self.volume(name)

    def change(self, name: str, changes: dict[str, Any]) -> VolumeView:
        """Change fields of the spec that concern how replicas are kept."""
        if not changes:
            raise RequestError("nothing to change was named")
        volume = self._volume(name)
        for field, value in changes.items():
            setattr(volume.spec, field, value)
        check_settings(volume.spec)

        def change(item: Volume) -> None:
            for field, value in changes.items():
                setattr(item.spec, field, value)

        modify(self._store, Volume, name, change)
        return self.volume(name)

    def resize(self, name: str, size_bytes: int, wait_seconds: float) -> VolumeView:
        """Make a volume larger, attached or not."""
        check_size(size_bytes)

        def want(item: Volume) -> None:
            if not item.status.established:
                raise ConflictError(f"volume {name} is still being made; resize it when it is done")
            if size_bytes < item.spec.size_bytes:
                raise RequestError(
                    f"volume {name} has {item.spec.size_bytes} bytes and cannot shrink to "
                    f"{size_bytes}; choose a larger size"
                )
            item.spec.size_bytes = size_bytes

        self._volume(name)
        wanted = modify(self._store, Volume, name, want)

        self._await(wanted, self._has_its_size, wait_seconds, f"{size_bytes} bytes long")
        return self.volume(name)

    def remove(self, name: str, force: bool, wait_seconds: float) -> None:
        """Remove a volume with all its data."""
        volume = self._volume(name)
        if volume.spec.attached or volume.status.frontend is not None:
            if not force:
                raise ConflictError(
                    f"volume {name} is attached; detach it first (`blockd volume detach {name}`), "
                    "or remove it with --force"
                )
            modify(self._store, Volume, name, _want_detached)
        for item in self._context.snapshots_of(name):
            if item.spec.attached and not force:
                raise attached_error(item, "volume " + name)
        self._store.delete(Volume, name)
        uid, deadline = volume.metadata.uid, time.monotonic() + wait_seconds
        while wait_seconds > 0:
            left = find(self._store, Volume, name)
            if left is None or left.metadata.uid != uid:
                return
            problem = left.status.problem
            seen = left.status.observed_generation >= left.metadata.generation
            refuse_if_final(problem if force and seen else None)
            if time.monotonic() > deadline:
                raise DeadlineError(late(f"volume {name} is not removed", wait_seconds, left))
            time.sleep(POLL_SECONDS)

    def attach(self, name: str, frontend: str, wait_seconds: float) -> VolumeView:
        """Make the volume reachable."""
        volume = self._volume(name)
        check_attaching(f"volume {name}", volume.spec.attached, volume.status.frontend, frontend)

        def want(item: Volume) -> None:
            item.spec.attached = True
            if not volume.spec.attached:
                item.spec.frontend = frontend

        wanted = modify(self._store, Volume, name, want)
        undo = _want_detached if not volume.spec.attached else None
        self._await(wanted, lambda v: v.status.state == "attached", wait_seconds, "attached", undo)
        return self.volume(name)

    def detach(self, name: str, wait_seconds: float) -> VolumeView:
        """Take the volume's device down; refused while something uses it."""
        volume = self._volume(name)
        if volume.status.mount is not None:
            raise ConflictError(
                f"volume {name} is mounted at {volume.status.mount}; unmount it first: "
                f"`blockd volume umount {name}`"
            )
        before = volume.spec

        def want(item: Volume) -> None:
            item.spec.attached, item.spec.mount = False, None

        def undo(item: Volume) -> None:
            item.spec.attached = before.attached

        wanted = modify(self._store, Volume, name, want)
        self._await(
            wanted,
            lambda v: v.status.frontend is None and v.status.state == "detached",
            wait_seconds,
            "detached",
            undo,
        )
        return self.volume(name)

    def mount(self, name: str, path: str | None, fs: str, wait_seconds: float) -> VolumeView:
        """Mount an attached volume; a blank one gets a file system."""
        volume = self._volume(name)
        mounts.check_file_system(fs)
        where = check_path(path) if path else str(self._context.home.mount_point(name))
        if not volume.spec.attached:
            raise ConflictError(
                f"volume {name} is detached; attach it first: `blockd volume attach {name}`"
            )
        if volume.status.mount not in (None, where):
            raise ConflictError(
                f"volume {name} is mounted at {volume.status.mount} already; unmount it first: "
                f"`blockd volume umount {name}`"
            )
        if volume.status.frontend == "socket":
            raise ConflictError(no_device_text(name, "socket"))
        wanted = modify(
            self._store, Volume, name, lambda v: setattr(v.spec, "mount", Mount(where, fs))
        )
        self._await(
            wanted,
            lambda v: v.status.mount == where,
            wait_seconds,
            "mounted",
            None if volume.spec.mount else lambda v: setattr(v.spec, "mount", None),
        )
        return self.volume(name)

    def unmount(self, name: str, wait_seconds: float) -> VolumeView:
        """Unmount a volume; it stays attached."""
        volume = self._volume(name)
        before = volume.spec.mount
        wanted = modify(self._store, Volume, name, lambda v: setattr(v.spec, "mount", None))
        self._await(
            wanted,
            lambda v: v.status.mount is None,
            wait_seconds,
            "unmounted",
            lambda v: setattr(v.spec, "mount", before),
        )
        return self.volume(name)

    # -- replicas -------------------------------------------------------------------------------

    def replica_add(self, volume: str, wait_seconds: float) -> VolumeView:
        """One more copy; it is OUT until a rebuild has filled it."""
        item = self._volume(volume)
        if item.metadata.deleted or not item.status.established:
            raise ConflictError(f"volume {volume} is not ready for another replica; try later")
        live = self._live_replicas(volume)
        if len(live) >= REPLICAS_MAX:
            raise ConflictError(
                f"volume {volume} has {len(live)} replicas, the limit is {REPLICAS_MAX}"
            )
        uid = self._context.new_replica(volume).metadata.name
        if len(live) + 1 > item.spec.replicas:
            modify(
                self._store, Volume, volume, lambda v: setattr(v.spec, "replicas", len(live) + 1)
            )
        self._await(item, lambda v: self._is_member(volume, uid), wait_seconds, "extended")
        return self.volume(volume)

    def replica_remove(self, volume: str, replica: str, wait_seconds: float) -> VolumeView:
        """One copy less. A good copy that goes lowers the wanted count, a lost one does not."""
        view = self._replica_view(volume, replica)
        others = [
            other
            for other in self.volume(volume).replicas
            if other.id != view.id and other.state == IN_SYNC
        ]
        if view.state == IN_SYNC and not others:
            raise ConflictError(
                f"replica {replica} is the last one of volume {volume} in sync; add another and "
                f"rebuild it first: `blockd replica add {volume}`"
            )
        if view.state == IN_SYNC:
            left = len(self._live_replicas(volume)) - 1
            modify(
                self._store,
                Volume,
                volume,
                lambda v: setattr(v.spec, "replicas", max(1, min(v.spec.replicas, left))),
            )
        item = self._volume(volume)
        self._store.delete(Replica, view.id)
        self._await(
            item,
            lambda v: find(self._store, Replica, view.id) is None,
            wait_seconds,
            f"rid of replica {replica}",
        )
        return self.volume(volume)

    def rebuild(self, volume: str, replica: str | None, wait_seconds: float) -> VolumeView:
        """Start the rebuild of one replica, or of all that are OUT; refused if there is none."""
        item = self._volume(volume)
        views = self.volume(volume).replicas
        if replica is not None:
            views = [self._replica_view(volume, replica)]
        views = [view for view in views if view.state not in (IN_SYNC, "SYNCING")]
        if not views:
            return self.volume(volume)
        request = new_uid()
        for view in views:
            modify(self._store, Replica, view.id, lambda r: setattr(r.spec, "rebuild_id", request))

        def started(_: Volume) -> bool:
            items = [find(self._store, Replica, view.id) for view in views]
            return all(i is None or i.status.rebuild_id == request for i in items)

        self._await(item, started, wait_seconds, "rebuilding")
        return self.volume(volume)

    def upgrade(self, volume: str, program: str | None, wait_seconds: float) -> VolumeView:
        """Run the daemons of a volume with another program, or anew, while it is in use."""
        self._volume(volume)
        if program is not None:
            check_program(program)
        request = Upgrade(new_uid(), program)
        wanted = modify(self._store, Volume, volume, lambda v: setattr(v.spec, "upgrade", request))

        def done(item: Volume) -> bool:
            if item.status.upgrade_id != request.id:
                return False
            refuse(item.status.upgrade_problem)
            return True

        self._await(wanted, done, wait_seconds, "upgraded")
        return self.volume(volume)

    def verify(self, volume: str) -> VolumeView:
        """Begin to check and compare every block of an attached volume on all its replicas."""
        daemon = self._running_daemon(volume, "compares the replicas")
        control.ask(daemon.control, "verify")
        return self.volume(volume)

    # -- helpers --------------------------------------------------------------------------------

    def _live_replicas(self, volume: str) -> list[Replica]:
        return [i for i in self._context.replicas_of(volume) if i.metadata.deleted is None]

    def _replica_view(self, volume: str, replica: str) -> ReplicaView:
        for view in self.volume(volume).replicas:
            if view.id == replica:
                return view
        raise NotFoundError(
            f"volume {volume} has no replica {replica}; see `blockd replica ls {volume}`"
        )

    def _has_its_size(self, item: Volume) -> bool:
        record = self._record(item.metadata.name) if item.status.established else None
        return record is not None and record.size_bytes >= item.spec.size_bytes

    def _is_member(self, volume: str, uid: str) -> bool:
        record = self._record(volume)
        return record is not None and uid in record.members


def _want_detached(item: Volume) -> None:
    item.spec.attached, item.spec.mount = False, None
