"""Upgrades: the daemons of a volume run another program, one after the other, in use.

The volume daemon first: its successor takes over from it (blockd/daemons/handover.py), and if that
fails the old one goes on and the upgrade has failed. Then the replica daemons one at a time, each
only while every member is in sync, so that the others serve meanwhile; the returning one is made
equal before the next one is stopped. The daemon of the only replica is left alone.

What was upgraded is read from the daemons: each carries the id of the newest upgrade as its label,
because whatever starts it after the request starts it with the new program. So a pass goes on where
the last one stopped, also after a death of the node service. A replica daemon that does not start
ends the upgrade: the others are left alone, and it is started again with the old program.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockd.node import control, local_replicas
from blockd.node.context import Context, log
from blockd.node.control import Answer
from blockd.node.objects import Problem, Replica, Volume
from blockd.node.store import modify_status
from blockd.node.supervisor import DaemonSpec
from protocol.errors import BlockdError, PeerError, StateError
from replication.authority import IN_SYNC


def waits(volume: Volume) -> bool:
    """Is there an upgrade that has not ended?"""
    return volume.spec.upgrade is not None and volume.spec.upgrade.id != volume.status.upgrade_id


class UpgradeReconciler:
    """The upgrade of one volume after another."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def reconcile(self, volume: Volume, replicas: Sequence[Replica], daemon: DaemonSpec) -> Volume:
        """One step of an upgrade; `daemon` is the volume daemon, which may not run."""
        wanted = volume.spec.upgrade
        if wanted is None or not waits(volume):
            return volume
        name, supervisor = volume.metadata.name, self._context.supervisor
        answer: Answer | None = None
        if supervisor.pid(daemon) is not None:
            answer = control.status(daemon.control)
            if answer.get("label") != wanted.id:
                try:
                    answer = supervisor.replace(daemon)
                except BlockdError as error:
                    log.warning("volume %s: not upgraded: %s", name, error)
                    return self._ended(volume, Problem.of(error))
                log.info("volume %s: volume daemon upgraded, pid %s", name, answer["pid"])
        failed = next((item for item in replicas if _has_ended(item)), None)
        if failed is not None:
            text = f"replica {failed.metadata.name} does not run: {failed.status.message}"
            log.warning("volume %s: not upgraded: %s", name, text)
            return self._ended(volume, Problem.of(StateError(text)))
        if answer is not None and not _all_in_sync(answer):
            return volume
        old = self._old_replica(volume, replicas)
        if old is None:
            log.info("volume %s: upgraded", name)
            return self._ended(volume, None)
        supervisor.stop(self._context.replica_daemon(volume, old))  # the next pass starts it
        return volume

    def _old_replica(self, volume: Volume, replicas: Sequence[Replica]) -> Replica | None:
        """A replica daemon that still has to be replaced."""
        assert volume.spec.upgrade is not None
        with_daemon = [item for item in replicas if not local_replicas.is_local(item)]
        if len(replicas) < 2:
            return None
        for replica in with_daemon:
            spec = self._context.replica_daemon(volume, replica)
            if replica.metadata.deleted is not None or self._context.supervisor.pid(spec) is None:
                continue
            try:
                answer = control.status(spec.control)
            except PeerError:
                continue  # it hangs or has just ended: what replaces it has the new program
            if answer.get("label") != volume.spec.upgrade.id:
                return replica
        return None

    def _ended(self, volume: Volume, problem: Problem | None) -> Volume:
        assert volume.spec.upgrade is not None
        upgrade = volume.spec.upgrade

        def note(item: Volume) -> None:
            item.status.upgrade_id, item.status.upgrade_problem = upgrade.id, problem
            if problem is None:
                item.status.program = upgrade.program

        return modify_status(self._context.store, Volume, volume.metadata.name, note)


def _has_ended(replica: Replica) -> bool:
    """Is there no daemon? One that is late with its answer is waited for."""
    return replica.status.state == "failed" and replica.status.failed_since is not None


def _all_in_sync(answer: Answer) -> bool:
    """Can every member be spared for a while?"""
    return all(item["state"] == IN_SYNC and item["connected"] for item in answer["members"])
