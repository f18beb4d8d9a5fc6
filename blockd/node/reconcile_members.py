"""Members: the authority's record of a volume follows the replica objects.

The record is made once, when all replicas of a new volume are there and equal, so all are in sync.
From then on the volume daemon changes it; this module asks the daemon, and touches the record
itself (compare-and-swap) only while no volume daemon runs, and then only members that are OUT.

Members that are OUT are rebuilt by the volume daemon, which is started for that if need be; a
request for a rebuild makes it try at once, whatever failed before.
"""

from __future__ import annotations

from dataclasses import replace

from blockd.node import control
from blockd.node.context import Context, log
from blockd.node.objects import Replica, Volume
from blockd.node.reconcile_replicas import ReplicaReconciler, is_lost
from blockd.node.store import modify_status
from blockd.node.supervisor import DaemonSpec
from protocol.errors import BlockdError, StateError, StorageError
from replication.authority import IN_SYNC, OUT, Member, Record


class MemberReconciler:
    """Members of one volume after another."""

    def __init__(self, context: Context, replicas: ReplicaReconciler) -> None:
        self._context = context
        self._replicas = replicas

    def load(self, volume: Volume) -> Record | None:
        """The record; an established volume without one is an error and never made anew."""
        record = self._context.authority.load(volume.metadata.uid)
        if record is None and volume.status.established:
            raise StorageError(
                f"the record of volume {volume.metadata.name} is missing in "
                f"{self._context.home.state_path}; its replicas are not touched: restore the file"
            )
        return record

    def establish(self, volume: Volume, replicas: list[Replica]) -> Record:
        """Make the record of a new volume; all its replicas are equal: blank, or clones."""
        for replica in replicas:
            if replica.status.state != "running":
                raise _creation_error(volume, replica)
        name, source = volume.metadata.name, volume.spec.source
        if not replicas or any((item.spec.source is None) != (source is None) for item in replicas):
            raise StateError(f"volume {name} cannot be created: its replicas are not alike")
        record = self._context.authority.create(
            Record(
                volume_uuid=volume.metadata.uid,
                volume_name=name,
                size_bytes=source.size_bytes if source else volume.spec.size_bytes,
                members={
                    item.metadata.name: Member(IN_SYNC, item.status.address or "")
                    for item in replicas
                },
            )
        )
        log.info("volume %s: created with %d replicas", name, len(replicas))
        return record

    def work(self, record: Record, replicas: list[Replica]) -> bool:
        """Whether members need the volume daemon."""
        for replica in replicas:
            member = record.members.get(replica.metadata.name)
            if member is None:
                continue
            if replica.metadata.deleted is not None:
                if member.state != OUT:
                    return True
            elif replica.status.state == "running" and member.state != IN_SYNC:
                return True
        return False

    def align(
        self, volume: Volume, record: Record, replicas: list[Replica], daemon: DaemonSpec | None
    ) -> None:
        """Add, remove and rebuild members; `daemon` is the volume daemon if it runs."""
        for replica in replicas:
            uid = replica.metadata.name
            member = record.members.get(uid)
            if replica.metadata.deleted is not None:
                if member is not None:
                    record = self._remove(volume, record, uid, daemon)
                self._replicas.destroy(volume, replica)
            elif replica.status.provisioned and replica.status.address:
                address = replica.status.address
                if member is None:
                    record = self._add(volume, record, uid, address, daemon)
                elif member.address != address:
                    record = self._move(record, uid, address, daemon)
                if daemon is not None and replica.status.state == "running":
                    self._rebuild(volume.metadata.name, replica, record.members[uid].state, daemon)

    def _add(
        self, volume: Volume, record: Record, uid: str, address: str, daemon: DaemonSpec | None
    ) -> Record:
        log.info("volume %s: member %s added", volume.metadata.name, uid)
        if daemon is not None:
            control.ask(daemon.control, "member-add", replica_uuid=uid, address=address)
            return self._loaded(record)
        members = {**record.members, uid: Member(OUT, address)}
        return self._context.authority.swap(
            replace(record, members=members, config_seq=record.config_seq + 1)
        )

    def _remove(
        self, volume: Volume, record: Record, uid: str, daemon: DaemonSpec | None
    ) -> Record:
        log.info("volume %s: member %s removed", volume.metadata.name, uid)
        if daemon is not None:
            control.ask(daemon.control, "member-remove", replica_uuid=uid)
            return self._loaded(record)
        if record.members[uid].state != OUT:
            raise StateError(f"member {uid} can be removed only by the volume daemon")
        members = {key: member for key, member in record.members.items() if key != uid}
        return self._context.authority.swap(
            replace(record, members=members, config_seq=record.config_seq + 1)
        )

    def _move(self, record: Record, uid: str, address: str, daemon: DaemonSpec | None) -> Record:
        if daemon is not None:
            control.ask(daemon.control, "member-address", replica_uuid=uid, address=address)
            return self._loaded(record)
        members = {**record.members, uid: replace(record.members[uid], address=address)}
        return self._context.authority.swap(replace(record, members=members))

    def _loaded(self, record: Record) -> Record:
        """The record after the volume daemon changed it."""
        newest = self._context.authority.load(record.volume_uuid)
        assert newest is not None, "the record of a running volume"
        return newest

    def _rebuild(self, name: str, replica: Replica, state: str, daemon: DaemonSpec) -> None:
        """Do what was asked for: have the volume daemon start a rebuild at once."""
        uid = replica.metadata.name
        if replica.spec.rebuild_id == replica.status.rebuild_id:
            return
        if state == OUT:
            try:
                control.ask(daemon.control, "rebuild", replica_uuid=uid)
            except BlockdError as error:
                log.warning("volume %s: rebuild of %s: %s", name, uid, error)

        def note(item: Replica) -> None:
            item.status.rebuild_id = replica.spec.rebuild_id

        modify_status(self._context.store, Replica, uid, note)


def _creation_error(volume: Volume, replica: Replica) -> BlockdError:
    text = (
        f"volume {volume.metadata.name} cannot be created: "
        f"{replica.status.message or 'a replica daemon has not started'}"
    )
    return StorageError(text) if is_lost(volume, replica) else StateError(text)
