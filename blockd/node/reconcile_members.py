"""Members: the authority's record of a volume follows the replica objects.

The record is made once, when all replicas of a new volume are there and blank, so all are in sync.
From then on the volume daemon changes it; this module asks the daemon, and touches the record
itself (compare-and-swap) only while no volume daemon runs, and then only members that are OUT.

A member that is OUT while its daemon runs is rebuilt: at once if asked for, else after the
volume's wait. One rebuild runs at a time; the others stay due.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from blockd.node import control
from blockd.node.context import Context, log
from blockd.node.objects import Replica, Volume, utc_now
from blockd.node.reconcile_replicas import ReplicaReconciler, is_lost, seconds_since
from blockd.node.store import modify_status
from blockd.node.supervisor import DaemonSpec
from protocol.errors import BlockdError, StateError, StorageError
from replication.authority import IN_SYNC, OUT, SYNCING, Member, Record

LONG_AGO = "1970-01-01T00:00:00Z"  # a rebuild that was asked for is due whatever the wait


@dataclass(frozen=True)
class Work:
    """What is to be done about members: `now` needs the volume daemon, `wait_seconds` is until
    the next rebuild is due."""

    now: bool
    wait_seconds: float | None = None


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
        """Make the record of a new volume; all its replicas are blank and equal."""
        for replica in replicas:
            if replica.status.state != "running":
                raise _creation_error(volume, replica)
        name = volume.metadata.name
        record = self._context.authority.create(
            Record(
                volume_uuid=volume.metadata.uid,
                volume_name=name,
                size_bytes=volume.spec.size_bytes,
                members={
                    item.metadata.name: Member(IN_SYNC, item.status.address or "")
                    for item in replicas
                },
            )
        )
        log.info("volume %s: created with %d replicas", name, len(replicas))
        return record

    def work(self, volume: Volume, record: Record, replicas: list[Replica]) -> Work:
        """Whether members need the volume daemon now, or when."""
        waits = []
        for replica in replicas:
            member = record.members.get(replica.metadata.name)
            if replica.metadata.deleted is not None:
                if member is not None and member.state != OUT:
                    return Work(now=True)
                continue
            if replica.status.state != "running" or member is None:
                continue
            if member.state == SYNCING or _asked(replica):
                return Work(now=True)
            if member.state == OUT:
                waits.append(_wait_seconds(volume, replica))
        if any(wait <= 0 for wait in waits):
            return Work(now=True)
        return Work(now=False, wait_seconds=min(waits, default=None))

    def align(
        self, volume: Volume, record: Record, replicas: list[Replica], daemon: DaemonSpec | None
    ) -> None:
        """Add, remove and rebuild members; `daemon` is the volume daemon if it runs."""
        busy = [uid for uid, member in record.members.items() if member.state == SYNCING]
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
                state = record.members[uid].state
                if daemon is None or replica.status.state != "running":
                    self._note_out(volume, replica, state)
                elif self._follow(volume, replica, state, busy, daemon):
                    busy.append(uid)

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

    def _note_out(self, volume: Volume, replica: Replica, state: str) -> None:
        """Note since when a member is OUT."""
        since = (replica.status.out_since or utc_now()) if state == OUT else None

        def note(item: Replica) -> None:
            item.status.out_since = since
            if item.status.state == "running":
                item.status.message = _due_text(volume, since) if since else None

        modify_status(self._context.store, Replica, replica.metadata.name, note)

    def _follow(
        self, volume: Volume, replica: Replica, state: str, busy: list[str], daemon: DaemonSpec
    ) -> bool:
        """Start the rebuild of a member if it is due and no other is `busy`; True if it began."""
        uid, asked = replica.metadata.name, _asked(replica)
        since, message, began = None, None, False
        if state == OUT:
            since = LONG_AGO if asked else replica.status.out_since or utc_now()
            message = _due_text(volume, since)
            if asked or _wait_seconds(volume, replica) <= 0:
                if busy:
                    message = f"its rebuild waits for the end of that of {busy[0]}"
                else:
                    since, message = self._rebuild(volume.metadata.name, replica, daemon)
                    began = message is None

        def note(item: Replica) -> None:
            item.status.out_since, item.status.message = since, message
            item.status.rebuild_id = replica.spec.rebuild_id

        modify_status(self._context.store, Replica, uid, note)
        return began

    def _rebuild(self, name: str, replica: Replica, daemon: DaemonSpec) -> tuple[str, str | None]:
        """Start a rebuild. Since when it counts as waited for, and why it did not start.

        What waiting helps against (a snapshot being made, a daemon that is not connected yet)
        keeps it due; after anything else, the volume's wait begins anew.
        """
        uid = replica.metadata.name
        try:
            control.ask(daemon.control, "rebuild", replica_uuid=uid)
        except BlockdError as error:
            message = f"its rebuild cannot start yet: {error}" if error.retry else str(error)
            if message != replica.status.message:
                log.warning("volume %s: rebuild of %s: %s", name, uid, error)
            return LONG_AGO if error.retry else utc_now(), message
        log.info("volume %s: rebuild of %s started", name, uid)
        return utc_now(), None


def _due_text(volume: Volume, since: str) -> str:
    """When a rebuild begins by itself, and how it begins at once."""
    wait = timedelta(seconds=volume.spec.rebuild_wait_seconds)
    due = (datetime.fromisoformat(since) + wait).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = volume.metadata.name
    return f"out of sync; its rebuild begins at {due}, or now: `blockd replica rebuild {name}`"


def _asked(replica: Replica) -> bool:
    return replica.spec.rebuild_id != replica.status.rebuild_id


def _wait_seconds(volume: Volume, replica: Replica) -> float:
    """Time until the rebuild of an OUT member is due."""
    if replica.status.out_since is None:
        return volume.spec.rebuild_wait_seconds
    return volume.spec.rebuild_wait_seconds - seconds_since(replica.status.out_since)


def _creation_error(volume: Volume, replica: Replica) -> BlockdError:
    text = (
        f"volume {volume.metadata.name} cannot be created: "
        f"{replica.status.message or 'a replica daemon has not started'}"
    )
    return StorageError(text) if is_lost(volume, replica) else StateError(text)
