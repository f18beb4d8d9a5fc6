"""Devices of snapshots: each attached snapshot has a read-only front end of its own.

The volume daemon serves them beside the volume; it runs as long as one is attached. Nothing is
mounted here. What cannot be done for one snapshot is that snapshot's problem and is tried again;
the volume and other snapshots go on.
"""

from __future__ import annotations

from collections.abc import Callable

from blockd.frontends import FRONT_ENDS, choose
from blockd.node import links
from blockd.node.context import Context, log
from blockd.node.objects import Problem, Snapshot, SnapshotStatus, Volume
from blockd.node.reconcile_devices import refuse_with_clients
from blockd.node.reconcile_replicas import remove_tree
from blockd.node.store import modify_status
from protocol.errors import BlockdError


class SnapshotDeviceReconciler:
    """Front ends of the snapshots of one volume after another."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def wanted(self, volume: str) -> bool:
        """Is a snapshot of this volume to be attached, or does it still have to come down?"""
        return any(_is_wanted(item) or item.status.frontend for item in self._items(volume))

    def settle_down(self, volume: Volume) -> None:
        """Take down what is not wanted (any more) or does not work (any more)."""
        for item in self._items(volume.metadata.name):
            if item.status.frontend is None:
                if item.status.ready and not _is_wanted(item) and not _is_settled(item):
                    self._note(item)
                continue
            target = self._context.target(volume, volume.status.epoch, item.spec.name)
            front_end = FRONT_ENDS[item.status.frontend]
            found = front_end.find(target)
            if found is not None and front_end.reconnects and not found.stale:
                self._try(self._reconnect, volume, item)
            if found is None or found.stale or not _is_wanted(item):
                self._try(self._take_down, volume, item)

    def bring_up(self, volume: Volume) -> None:
        """Make what is wanted."""
        for item in self._items(volume.metadata.name):
            if _is_wanted(item) and item.status.ready:
                self._try(self._bring_up, volume, item)

    def take_all_down(self, volume: Volume) -> None:
        """Whatever is wanted, with NBD clients or not; the error of a device that is in use."""
        for item in self._items(volume.metadata.name):
            if item.status.frontend is not None:
                self._take_down(volume, item, force=True)

    def _reconnect(self, volume: Volume, item: Snapshot) -> None:
        assert item.status.frontend is not None
        target = self._context.served_target(volume, volume.status.epoch, item.spec.name)
        FRONT_ENDS[item.status.frontend].attach(target)

    def _bring_up(self, volume: Volume, item: Snapshot) -> None:
        front_end = choose(item.status.frontend or item.spec.frontend)
        target = self._context.served_target(volume, volume.status.epoch, item.spec.name)

        def starting(snapshot: Snapshot) -> None:
            snapshot.status.frontend = front_end.name

        if item.status.frontend is None:  # written down first: a crash leaves nothing unknown
            modify_status(self._context.store, Snapshot, item.metadata.name, starting)
        device = front_end.attach(target).device
        if device is not None:
            links.make(target.export, device, attached_now=item.status.device != device)
        if item.status.nbd_uri is None:
            log.info("%s: attached, %s", target.what, device or target.nbd_uri)
        if not (_is_settled(item) and item.status.device == device and item.status.nbd_uri):
            self._note(item, device=device, nbd_uri=target.nbd_uri)

    def _take_down(self, volume: Volume, item: Snapshot, *, force: bool = False) -> None:
        assert item.status.frontend is not None
        target = self._context.target(volume, volume.status.epoch, item.spec.name)
        if item.status.frontend == "socket" and not force:
            refuse_with_clients(self._context, volume, item.spec.name)
        FRONT_ENDS[item.status.frontend].detach(target)
        links.remove(target.export, item.status.device)
        remove_tree(target.directory)
        log.info("%s: detached", target.what)
        self._note(item, frontend=None, device=None, nbd_uri=None)

    def _try(self, act: Callable[[Volume, Snapshot], None], volume: Volume, item: Snapshot) -> None:
        try:
            act(volume, item)
        except BlockdError as error:
            problem = Problem.of(error)
            if item.status.problem != problem:
                log.warning("snapshot %s: %s", item.metadata.name, error)
            self._note(item, problem=problem)

    def _items(self, volume: str) -> list[Snapshot]:
        return self._context.snapshots_of(volume)

    def _note(self, item: Snapshot, problem: Problem | None = None, **changes: object) -> None:
        def change(snapshot: Snapshot) -> None:
            snapshot.status.problem = problem
            snapshot.status.observed_generation = item.metadata.generation
            for field_name, value in changes.items():
                assert field_name in SnapshotStatus.__struct_fields__
                setattr(snapshot.status, field_name, value)

        modify_status(self._context.store, Snapshot, item.metadata.name, change)


def _is_wanted(item: Snapshot) -> bool:
    return item.spec.attached and item.metadata.deleted is None


def _is_settled(item: Snapshot) -> bool:
    status = item.status
    return status.observed_generation == item.metadata.generation and status.problem is None
