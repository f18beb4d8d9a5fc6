"""Replicas: as many objects as the volume wants, a daemon for each, their directories.

A volume's only replica has no daemon: the volume daemon opens it itself (local_replicas.py).

A replica directory is made blank exactly once, before the volume is established. Later a missing
or unreadable directory is a failed replica and never a reason to make a blank one under the same
id: the authority may still count it as a good copy.

A replica that failed for longer than the volume's wait is lost. A lost or missing replica is
replaced by a new one (one at a time, only while a good copy serves); the lost one is removed after
the new one is in sync, not before.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from blockd.node import control, local_replicas
from blockd.node.context import Context, log, replica_address
from blockd.node.control import Answer
from blockd.node.home import private_directory
from blockd.node.objects import Replica, Volume, utc_now
from blockd.node.store import modify_status
from protocol.errors import BlockdError, PeerError, StorageError
from replication.authority import IN_SYNC, Record


class ReplicaReconciler:
    """Replica objects and replica daemons."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def reconcile(self, volume: Volume, record: Record | None) -> list[Replica]:
        """Make what is missing and see that each daemon runs; all replicas as they are then."""
        self._fill_up(volume, record)
        replicas = self._context.replicas_of(volume.metadata.name)
        local = self._local(volume, replicas)
        launched: dict[str, BlockdError | None] = {}
        for replica in replicas:  # all start at the same time, then all are waited for
            if replica.metadata.deleted is None and replica.metadata.name not in local:
                launched[replica.metadata.name] = self._launch(volume, replica)
        return [
            self._await(volume, replica, launched[replica.metadata.name])
            if replica.metadata.name in launched
            else self._look_at_local(volume, replica, record)
            if replica.metadata.name in local and replica.metadata.deleted is None
            else replica
            for replica in replicas
        ]

    def _local(self, volume: Volume, replicas: list[Replica]) -> set[str]:
        """The replicas without a daemon: chosen anew only while no volume daemon runs."""
        if self._context.supervisor.pid(self._context.volume_daemon(volume, [])) is not None:
            return {item.metadata.name for item in replicas if local_replicas.is_local(item)}
        here = [item for item in replicas if item.spec.node == self._context.node_name]
        return {item.metadata.name for item in here} if len(replicas) == 1 else set()

    def _look_at_local(self, volume: Volume, replica: Replica, record: Record | None) -> Replica:
        """See that the directory is there and free for the volume daemon, or open in it."""
        context, name = self._context, replica.metadata.name
        address = local_replicas.local_address(replica)
        member = None
        try:
            private_directory(context.home.replicas_directory(volume.metadata.name))
            daemon = context.volume_daemon(volume, [])
            if context.supervisor.pid(daemon) is None:
                own = context.replica_daemon(volume, replica)
                context.supervisor.stop(own)
                context.supervisor.forget(own)
                local_replicas.make_directory(volume, replica, record)
                local_replicas.check_directory(replica)
            elif daemon.control.exists():  # else it is opening the volume right now
                member = local_replicas.member_of(replica, control.status(daemon.control))
            unsharing = local_replicas.unsharing_left(replica)
        except PeerError:
            return replica  # the volume daemon ended or hangs; the pass finds that out next
        except BlockdError as error:
            failure = error
            if replica.status.message != str(error):
                log.warning("volume %s: %s", volume.metadata.name, error)
            return modify_status(
                context.store,
                Replica,
                name,
                lambda r: local_replicas.note_unusable(r.status, address, failure),
            )
        return modify_status(
            context.store,
            Replica,
            name,
            lambda r: local_replicas.note_usable(r.status, address, r.spec.path, member, unsharing),
        )

    def destroy(self, volume: Volume, replica: Replica) -> None:
        """Stop the daemon, remove the directory, let the object go."""
        context = self._context
        spec = context.replica_daemon(volume, replica)
        context.supervisor.stop(spec)
        context.supervisor.forget(spec)
        remove_tree(Path(replica.spec.path))
        for path in (spec.log, spec.pid_file, spec.control):
            path.unlink(missing_ok=True)
        context.drop_replica(replica)
        log.info("volume %s: replica %s removed", volume.metadata.name, replica.metadata.name)

    def _fill_up(self, volume: Volume, record: Record | None) -> None:
        replicas = self._context.replicas_of(volume.metadata.name)
        live = [item for item in replicas if item.metadata.deleted is None]
        if not volume.status.established:
            if volume.spec.source is not None:
                return  # a blank one is not equal to those that were cloned
            for _ in range(volume.spec.replicas - len(live)):
                self._context.new_replica(volume.metadata.name)
            return
        if record is None:
            return
        lost = [item for item in live if is_lost(volume, item)]
        missing = volume.spec.replicas - (len(live) - len(lost))
        in_sync = {uid for uid, member in record.members.items() if member.state == IN_SYNC}
        if missing <= 0:
            self._retire(lost, in_sync, volume)
            return
        serving = any(i.metadata.name in in_sync and i.status.state == "running" for i in live)
        filling = any(i.metadata.name not in in_sync and i not in lost for i in live)
        if serving and not filling and self._short_for_long(volume):
            made = self._context.new_replica(volume.metadata.name)
            log.info(
                "volume %s: replica %s added to replace a lost one",
                volume.metadata.name,
                made.metadata.name,
            )

    def _short_for_long(self, volume: Volume) -> bool:
        if volume.status.short_since is None:
            now = utc_now()
            name = volume.metadata.name
            modify_status(
                self._context.store, Volume, name, lambda v: setattr(v.status, "short_since", now)
            )
            return False
        return seconds_since(volume.status.short_since) >= volume.spec.rebuild_wait_seconds

    def _retire(self, lost: list[Replica], in_sync: set[str], volume: Volume) -> None:
        """Enough others: let the lost ones go once as many as wanted are in sync."""
        good = in_sync - {item.metadata.name for item in lost}
        if lost and len(good) >= volume.spec.replicas:
            for item in lost:
                self._context.store.delete(Replica, item.metadata.name)
        if volume.status.short_since is not None:
            name = volume.metadata.name
            modify_status(
                self._context.store, Volume, name, lambda v: setattr(v.status, "short_since", None)
            )

    def _launch(self, volume: Volume, replica: Replica) -> BlockdError | None:
        try:
            private_directory(self._context.home.replicas_directory(volume.metadata.name))
            self._context.supervisor.launch(self._context.replica_daemon(volume, replica))
        except BlockdError as error:
            return error
        return None

    def _await(self, volume: Volume, replica: Replica, error: BlockdError | None) -> Replica:
        """Wait for the daemon and write down what it says."""
        store, name = self._context.store, replica.metadata.name
        spec = self._context.replica_daemon(volume, replica)
        if error is None:
            try:
                answer = self._context.supervisor.ready(spec)
            except BlockdError as failure:
                error = failure
            else:
                address = replica_address(spec)
                return modify_status(store, Replica, name, lambda r: _running(r, answer, address))
        failure_text, hung = str(error), isinstance(error, PeerError)
        if replica.status.message != failure_text and replica.status.state != "failed":
            log.warning("volume %s: %s", volume.metadata.name, failure_text)
        return modify_status(store, Replica, name, lambda r: _failed(r, failure_text, hung))


def is_lost(volume: Volume, replica: Replica) -> bool:
    """True if its daemon could not be brought back for longer than the volume's wait."""
    since = replica.status.failed_since
    return since is not None and seconds_since(since) >= volume.spec.rebuild_wait_seconds


def seconds_since(moment: str) -> float:
    """Seconds that passed since an ISO time."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; fine if it is gone already."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"directory {path} cannot be removed: {error.strerror}; remove it by hand"
        ) from error


def _running(replica: Replica, answer: Answer, address: str) -> None:
    status = replica.status
    if status.state != "running":  # else what is said of a rebuild stands until it is looked at
        status.message = None
    status.state, status.failed_since = "running", None
    if answer.get("failed"):
        status.state, status.message = "failed", str(answer["failed"])
    status.provisioned = True
    status.pid = int(answer["pid"])
    status.address = address
    status.allocated_bytes = int(answer.get("allocated_bytes", 0))
    status.unsharing_bytes = int(answer.get("unsharing_bytes", 0))


def _failed(replica: Replica, message: str, hung: bool) -> None:
    status = replica.status
    status.state, status.message = "failed", message
    if not hung:  # a process that is there but slow keeps its place
        status.pid = None
        status.failed_since = status.failed_since or utc_now()
