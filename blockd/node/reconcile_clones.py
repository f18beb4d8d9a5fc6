"""Clones: new volumes whose replicas share the layers of a snapshot of another volume.

The pass over the source volume makes them, because its volume daemon has to run and its snapshot to
be there: it makes the replica objects of the clone, one beside each replica in sync (as many as the
clone wants, if there are so many; a rebuild makes the others), has the directories made, and calls
the clone's replicas provisioned. The pass over the clone waits for that and goes on as with any new
volume. Repeating it after a crash finds what was made.
"""

from __future__ import annotations

from pathlib import Path

from blockd.node import control
from blockd.node.context import Context, log
from blockd.node.objects import Problem, Replica, Snapshot, Source, Volume, VolumeSpec, snapshot_key
from blockd.node.reconcile_replicas import remove_tree
from blockd.node.store import find, modify_status
from blockd.node.supervisor import DaemonSpec
from protocol.errors import BlockdError, NotFoundError, RequestError, StateError
from protocol.units import check_size
from replication.authority import IN_SYNC, Record

CLONE_SECONDS_MAX = 60.0  # members answer within seconds or are lost


def clone_spec(
    context: Context,
    volume: str,
    snapshot: str,
    *,
    replicas: int | None = None,
    size_bytes: int | None = None,
    full: bool = False,
) -> VolumeSpec:
    """What a door writes down to have VOLUME@SNAPSHOT cloned; what is not named is as there."""
    source = find(context.store, Volume, volume)
    record = context.authority.load(source.metadata.uid) if source is not None else None
    item = find(context.store, Snapshot, snapshot_key(volume, snapshot))
    if source is None or record is None or item is None or not item.status.ready:
        raise _missing(volume, snapshot)
    if size_bytes is not None:
        check_size(size_bytes)
    if size_bytes is not None and size_bytes < record.size_bytes:
        raise RequestError(
            f"a clone of {volume}@{snapshot} cannot have {size_bytes} bytes, the volume has "
            f"{record.size_bytes}; choose at least that"
        )
    return VolumeSpec(
        size_bytes=size_bytes or record.size_bytes,
        replicas=replicas or source.spec.replicas,
        block_size=source.spec.block_size,
        source=Source(volume, snapshot, record.size_bytes, full),
    )


def waits_for_clone(volume: Volume) -> bool:
    """Is this a clone whose replicas are not made yet?"""
    return (
        volume.spec.source is not None
        and not volume.status.established
        and not volume.status.cloned
        and volume.metadata.deleted is None
    )


class CloneReconciler:
    """What waits to be cloned from one volume after another."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def pending(self, source: str) -> list[Volume]:
        """The volumes that wait to be cloned from this one and have not failed."""
        return [
            item
            for item in self._context.store.list(Volume)
            if waits_for_clone(item)
            and item.spec.source is not None
            and item.spec.source.volume == source
            and not _failed(item)
        ]

    def reconcile(self, source: Volume, record: Record, daemon: DaemonSpec) -> None:
        """Make what waits; what cannot be done is the clone's problem."""
        for item in self.pending(source.metadata.name):
            name = item.metadata.name
            try:
                if self._still_waits(item):  # each of those before it may have taken its time
                    self._clone(item, record, daemon)
            except BlockdError as error:
                log.warning("volume %s: %s", name, error)
                self._note(item, Problem.of(error))

    def check_source(self, volume: Volume) -> None:
        """NotFoundError if a clone waits in vain."""
        source = volume.spec.source
        assert source is not None
        found = find(self._context.store, Volume, source.volume)
        if found is None or found.metadata.deleted is not None:
            raise _missing(source.volume, source.snapshot)
        if found.status.problem is not None:
            raise StateError(f"volume {source.volume} is in trouble: {found.status.message}")

    def _clone(self, volume: Volume, record: Record, daemon: DaemonSpec) -> None:
        source, store = volume.spec.source, self._context.store
        assert source is not None
        name, uid = volume.metadata.name, volume.metadata.uid
        if find(store, Snapshot, snapshot_key(source.volume, source.snapshot)) is None:
            raise _missing(source.volume, source.snapshot)
        self._context.home.make_volume_directories(name, uid)
        replicas = self._replicas(volume, record)
        try:
            control.ask(
                daemon.control,
                "clone",
                timeout_seconds=CLONE_SECONDS_MAX,
                snapshot=source.snapshot,
                volume_uuid=uid,
                volume_name=name,
                size_bytes=source.size_bytes,
                targets={i.spec.source: (i.metadata.name, i.spec.path) for i in replicas},
                unshare=source.full,
            )
        finally:
            wanted = self._still_waits(volume)
            if not wanted:  # removed meanwhile: its own pass may have been done before the links
                for replica in replicas:
                    self._discard(replica)
        if not wanted:
            return
        for replica in replicas:
            modify_status(store, Replica, replica.metadata.name, _provisioned)
        self._note(volume, None, cloned=True)
        log.info("volume %s: cloned from %s@%s", name, source.volume, source.snapshot)

    def _replicas(self, volume: Volume, record: Record) -> list[Replica]:
        """The replica objects of the clone; those whose source is not in sync any more go."""
        name, store = volume.metadata.name, self._context.store
        usable = [uid for uid, member in record.members.items() if member.state == IN_SYNC]
        running = {
            item.metadata.name
            for item in self._context.replicas_of(record.volume_name)
            if item.status.state == "running" and item.metadata.deleted is None
        }
        usable = [uid for uid in usable if uid in running][: volume.spec.replicas]
        if not usable:
            raise StateError(f"no replica of volume {record.volume_name} is in sync")
        there = {item.spec.source: item for item in self._context.replicas_of(name)}
        if None in there:
            raise StateError(f"volume {name} has a replica that is no clone; remove the volume")
        for uid, item in there.items():
            if uid not in usable:
                self._discard(item)
        made = [there.get(uid) or self._context.new_replica(name, source=uid) for uid in usable]
        return [store.get(Replica, item.metadata.name) for item in made]

    def _still_waits(self, volume: Volume) -> bool:
        """Is it still there, the same one, and not done?"""
        current = find(self._context.store, Volume, volume.metadata.name)
        if current is None or current.metadata.uid != volume.metadata.uid:
            return False
        return waits_for_clone(current)

    def _discard(self, replica: Replica) -> None:
        """Remove the directory of a clone's replica, and its object."""
        remove_tree(Path(replica.spec.path))
        if find(self._context.store, Replica, replica.metadata.name) is not None:
            self._context.drop_replica(replica)

    def _note(self, volume: Volume, problem: Problem | None, *, cloned: bool = False) -> None:
        def change(item: Volume) -> None:
            item.status.cloned = cloned
            item.status.problem = problem
            item.status.message = problem.message if problem else None
            item.status.observed_generation = volume.metadata.generation

        if self._still_waits(volume):
            modify_status(self._context.store, Volume, volume.metadata.name, change)


def _failed(volume: Volume) -> bool:
    problem = volume.status.problem
    return problem is not None and not problem.retry


def _missing(volume: str, snapshot: str) -> NotFoundError:
    return NotFoundError(
        f"there is no snapshot {volume}@{snapshot} to clone; see `blockd snapshot ls {volume}`"
    )


def _provisioned(item: Replica) -> None:
    item.status.provisioned = True
