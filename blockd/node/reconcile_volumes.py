"""Volumes: one pass brings everything of a volume to what is wanted.

The order within a pass, and why:

1. replicas (objects, daemons), then the record: a volume daemon needs both
2. the volume daemon, if the volume is attached or something waits that only it can do; no volume
   daemon runs for a detached volume that nobody asks anything of
3. what is not wanted or broken comes down: mount, then device; devices of snapshots
4. snapshots, clones of this volume, then a revert: with the device down meanwhile
5. members: added, removed, rebuilt; a larger size
6. devices of snapshots; device, then mount
7. a step of an upgrade
8. the volume daemon is stopped if it is not needed any more (LINGER_SECONDS later, unless this
   was the detach)

A volume daemon that was fenced by another owner is not started again: the user decides, by
detaching and attaching.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from blockd.node import control, local_replicas
from blockd.node.context import Context, log
from blockd.node.control import Answer
from blockd.node.objects import Problem, Replica, Volume, VolumeStatus
from blockd.node.reconcile_clones import CloneReconciler, waits_for_clone
from blockd.node.reconcile_devices import DeviceReconciler
from blockd.node.reconcile_members import MemberReconciler
from blockd.node.reconcile_replicas import ReplicaReconciler, remove_tree
from blockd.node.reconcile_snapshot_devices import SnapshotDeviceReconciler
from blockd.node.reconcile_snapshots import SnapshotReconciler, mounted_error
from blockd.node.reconcile_upgrades import UpgradeReconciler
from blockd.node.reconcile_upgrades import waits as waits_for_upgrade
from blockd.node.store import find, modify, modify_status
from blockd.node.supervisor import DaemonSpec
from protocol.errors import (
    BlockdError,
    ConflictError,
    LostWritesError,
    PeerError,
    StateError,
)
from replication.authority import IN_SYNC, Record

CHECK_SECONDS = 3.0  # how often a healthy attached volume is looked at without cause
CHECK_UNHEALTHY_SECONDS = 1.0
CHECK_DETACHED_SECONDS = 30.0
CLONE_WAIT_SECONDS = 0.1  # between looks whether the pass over the source has made the replicas
UPGRADE_SECONDS = 0.3  # between its steps: a member that was stopped is started again, made equal
LINGER_SECONDS = 3.0  # a row of snapshots of a detached volume starts the volume daemon once


class VolumeReconciler:
    """Passes over volumes; see the order above."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.replicas = ReplicaReconciler(context)
        self.members = MemberReconciler(context, self.replicas)
        self.snapshots = SnapshotReconciler(context)
        self.clones = CloneReconciler(context)
        self.devices = DeviceReconciler(context)
        self.snapshot_devices = SnapshotDeviceReconciler(context)
        self.upgrades = UpgradeReconciler(context)
        self._idle_since: dict[str, float] = {}
        self._waiting_to_grow: dict[str, str] = {}  # why a larger size has to wait

    def reconcile(self, name: str) -> float | None:
        """One pass; seconds until the next one, None if the volume is gone."""
        volume = find(self._context.store, Volume, name)
        if volume is None:
            return None
        try:
            if volume.metadata.deleted is not None:
                self._remove(volume)
                return None
            if waits_for_clone(volume):  # what comes of it is noted by the pass over its source
                self.clones.check_source(volume)
                return CLONE_WAIT_SECONDS
            delay = self._converge(volume)
        except BlockdError as error:
            problem = Problem.of(error)
            self._note_problem(volume, problem)
            raise
        except Exception as error:  # a bug; the log has it all
            text = f"unexpected error {error!r}; see the log of the node service"
            self._note_problem(volume, Problem(BlockdError.code, text, retry=True))
            raise
        generation = volume.metadata.generation
        self._note(volume, observed_generation=generation, problem=None)
        return delay

    def _converge(self, volume: Volume) -> float:
        context, name = self._context, volume.metadata.name
        was_attached = volume.status.frontend is not None
        context.home.make_volume_directories(name, volume.metadata.uid)
        record = self.members.load(volume)
        replicas = self.replicas.reconcile(volume, record)
        if record is None:
            record = self.members.establish(volume, replicas)
        if not volume.status.established:
            volume = self._note(volume, established=True, state="detached")
        if self._needed(volume, record, replicas):
            spec, answer = self._start_daemon(volume, record, replicas)
            volume = self._note(
                volume, pid=int(answer["pid"]), epoch=int(answer["epoch"]), fenced=False
            )
            _configure(volume, spec, answer)
            volume = self.devices.settle_down(volume, volume.status.epoch)
            self.snapshot_devices.settle_down(volume)
            self.snapshots.reconcile(volume, spec)
            self.clones.reconcile(volume, record, spec)
            volume = self._revert(volume, spec)
            record = self.members.load(volume) or record
            self.members.align(volume, record, replicas, spec)
            delay = CHECK_SECONDS
            if record.size_bytes < volume.spec.size_bytes:
                delay = self._grow(volume, spec)
            self.snapshot_devices.bring_up(volume)
            if volume.spec.attached:  # a device gets the new size, too
                volume = self.devices.bring_up(volume, volume.status.epoch)
            volume = self.upgrades.reconcile(volume, replicas, spec)
            return min(delay, self._settle(volume, spec, was_attached))
        spec = context.volume_daemon(volume, [])
        volume = self.devices.settle_down(volume, volume.status.epoch)
        self.snapshot_devices.settle_down(volume)
        daemon = spec if context.supervisor.pid(spec) is not None else None
        self.members.align(volume, record, replicas, daemon)
        volume = self.upgrades.reconcile(volume, replicas, spec)
        return self._settle(volume, spec, was_attached)

    def _needed(self, volume: Volume, record: Record, replicas: list[Replica]) -> bool:
        """Whether the volume daemon has anything to do."""
        return (
            volume.spec.attached
            or self.devices.is_alive(volume)  # to be taken down its user has to be served
            or self.members.work(record, replicas)
            or self.snapshots.pending(volume.metadata.name)
            or self.snapshot_devices.wanted(volume.metadata.name)
            or bool(self.clones.pending(volume.metadata.name))
            or any(local_replicas.is_local(i) and i.status.unsharing_bytes for i in replicas)
            or _revert_waits(volume)
            or record.size_bytes < volume.spec.size_bytes
        )

    def _start_daemon(
        self, volume: Volume, record: Record, replicas: list[Replica]
    ) -> tuple[DaemonSpec, Answer]:
        context, name = self._context, volume.metadata.name
        addresses = [
            item.status.address
            for item in replicas
            # A volume daemon waits for every replica it is told of; one that does not run is OUT.
            if item.status.state == "running"
            and item.status.address
            and item.metadata.name in record.members
        ]
        consumer_alive = self.devices.is_alive(volume)
        spec = context.volume_daemon(volume, addresses, consumer_alive=consumer_alive)
        if context.supervisor.pid(spec) is None:
            self._note(volume, pid=None)
            ended = context.supervisor.ended(spec)
            fenced = ended is not None and ended.code == ConflictError.exit_code
            fenced = fenced and record.epoch > volume.status.epoch > 0
            if volume.spec.attached and (fenced or volume.status.fenced):
                self._note(volume, fenced=True)
                self.devices.cut_off(volume)  # its user must not meet what the other one wrote
                raise ConflictError(
                    f"volume {name} was taken over by another owner (epoch {record.epoch}); to "
                    f"take it back: `blockd volume detach {name}`, then attach it"
                )
            if not addresses:
                reasons = "; ".join(sorted({i.status.message or "" for i in replicas}))
                raise StateError(f"no replica of volume {name} runs: {reasons}")
        try:
            answer = context.supervisor.ensure(spec)
        except LostWritesError:
            self.devices.cut_off(volume)
            raise
        if answer.get("health") == "starting":
            raise PeerError(f"the volume daemon of {name} is still opening the volume")
        return spec, answer

    def _revert(self, volume: Volume, spec: DaemonSpec) -> Volume:
        """Do a revert that waits; what came of it is noted under its id."""
        revert = volume.spec.revert
        if revert is None or not _revert_waits(volume):
            return volume
        name, problem = volume.metadata.name, None
        try:
            if volume.status.frontend is not None:
                if volume.status.mount is not None and not revert.force:
                    raise mounted_error(volume)
                volume = self.devices.take_down(volume, volume.status.epoch, force=revert.force)
            name_of, force = revert.snapshot, revert.force
            control.ask(spec.control, "snapshot-revert", name=name_of, force=force, id=revert.id)
            log.info("volume %s: reverted to %s", name, revert.snapshot)
        except BlockdError as error:
            log.warning("volume %s: revert to %s: %s", name, revert.snapshot, error)
            problem = Problem.of(error)
        volume = self._context.store.get(Volume, name)
        return self._note(volume, revert_id=revert.id, revert_problem=problem)

    def _grow(self, volume: Volume, spec: DaemonSpec) -> float:
        """Ask for the larger size; seconds until the next attempt if that cannot be now."""
        name, size_bytes = volume.metadata.name, volume.spec.size_bytes
        try:
            control.ask(spec.control, "grow", size_bytes=size_bytes)
        except BlockdError as error:
            log.warning("volume %s: growing to %d bytes: %s", name, size_bytes, error)
            self._waiting_to_grow[name] = f"not {size_bytes} bytes long yet: {error}"
            return CHECK_UNHEALTHY_SECONDS
        log.info("volume %s: %d bytes from now on", name, size_bytes)
        self._waiting_to_grow.pop(name, None)
        return CHECK_SECONDS

    def _linger_seconds(self, name: str, was_attached: bool) -> float:
        """How long a volume daemon without work stays; 0 right after a detach."""
        if was_attached:
            return 0.0
        since = self._idle_since.setdefault(name, time.monotonic())
        return since + LINGER_SECONDS - time.monotonic()

    def _settle(self, volume: Volume, spec: DaemonSpec, was_attached: bool) -> float:
        """Note health, stop a volume daemon that is done; seconds until the next look."""
        context, name = self._context, volume.metadata.name
        replicas = context.replicas_of(name)
        record = self.members.load(volume)
        assert record is not None, "established above"
        message = next((i.status.message for i in replicas if i.status.message), None)
        if record.size_bytes < volume.spec.size_bytes:
            message = message or self._waiting_to_grow.get(name)
        changes: dict[str, object] = {
            "health": record_health(volume, record, replicas),
            "message": message,
            "allocated_bytes": max((i.status.allocated_bytes for i in replicas), default=0),
        }
        needed = self._needed(volume, record, replicas)
        if context.supervisor.pid(spec) is not None:
            answer = control.status(spec.control)
            needed = needed or _rebuilds(answer)
            if not needed:
                left_seconds = self._linger_seconds(name, was_attached)
                if left_seconds > 0:
                    self._note(volume, **changes)
                    return left_seconds
                context.supervisor.stop(spec)
            else:
                changes["health"] = daemon_health(volume, answer)
                changes["message"] = waiting_for(answer) or message
        if waits_for_upgrade(volume):
            changes["message"] = (
                changes["message"] or "the upgrade waits until all replicas are in sync"
            )
            self._note(volume, **changes)
            return UPGRADE_SECONDS
        if needed:
            if self.devices.is_alive(volume):
                context.supervisor.keep_spare(spec)
            self._idle_since.pop(name, None)
            self._note(volume, **changes)
            healthy = changes["health"] == "healthy" and message is None
            return CHECK_SECONDS if healthy else CHECK_UNHEALTHY_SECONDS
        self._idle_since.pop(name, None)
        context.supervisor.forget(spec)
        self._note(volume, **changes, pid=None, fenced=False)
        unsettled = [i for i in replicas if i.status.unsharing_bytes or i.status.state != "running"]
        if message or unsettled:
            return CHECK_UNHEALTHY_SECONDS
        if volume.status.short_since is not None or changes["health"] != "healthy":
            return CHECK_UNHEALTHY_SECONDS
        return CHECK_DETACHED_SECONDS

    def _remove(self, volume: Volume) -> None:
        """Stop everything of a deleted volume, then remove everything of it."""
        context, name = self._context, volume.metadata.name
        spec = context.volume_daemon(volume, [])
        if context.supervisor.pid(spec) is None:
            self.devices.cut_off(volume)  # what still waits for its data waits in vain
        self.devices.take_down(volume, volume.status.epoch, force=True)
        self.snapshot_devices.take_all_down(volume)
        context.supervisor.stop(spec)
        context.supervisor.forget(spec)
        self.snapshots.forget_all(name)
        for replica in context.replicas_of(name):
            context.store.delete(Replica, replica.metadata.name)
            self.replicas.destroy(volume, replica)
        context.authority.delete(volume.metadata.uid)
        for path in _directories(context, volume):
            remove_tree(path)
        modify(context.store, Volume, name, _drop_finalizers)
        log.info("volume %s: removed", name)

    def _note_problem(self, volume: Volume, problem: Problem) -> None:
        name = volume.metadata.name
        current = find(self._context.store, Volume, name)
        if current is None:
            return
        changes: dict[str, object] = {
            "problem": problem,
            "message": problem.message,
            "observed_generation": volume.metadata.generation,
        }
        if current.spec.attached and current.status.state not in ("attaching", "detaching"):
            spec = self._context.volume_daemon(current, [])
            if self._context.supervisor.pid(spec) is None:
                changes.update(state="error", health="faulted", pid=None)
        self._note(current, **changes)

    def _note(self, volume: Volume, **changes: object) -> Volume:
        def change(item: Volume) -> None:
            for field_name, value in changes.items():
                assert field_name in VolumeStatus.__struct_fields__
                setattr(item.status, field_name, value)

        return modify_status(self._context.store, Volume, volume.metadata.name, change)


def _configure(volume: Volume, spec: DaemonSpec, answer: Answer) -> None:
    """What the volume daemon should do with too few members, and how fast it may rebuild."""
    wanted: dict[str, Any] = {
        "min_in_sync": volume.spec.min_in_sync,
        "rebuild_bandwidth": volume.spec.rebuild_bandwidth,
    }
    if any(answer.get(key) != value for key, value in wanted.items()):
        control.ask(spec.control, "configure", **wanted)


def daemon_health(volume: Volume, answer: Answer) -> str:
    """The health of a volume whose daemon answered."""
    health = str(answer.get("health", "unknown"))
    if health == "starting":
        return "unknown"
    members = answer.get("members", [])
    if health == "healthy" and len(members) < volume.spec.replicas:
        return "degraded"
    return health


def waiting_for(answer: Answer) -> str | None:
    """What the writes of a volume wait for, from the status of its daemon."""
    if answer.get("suspended"):
        members = answer.get("members", [])
        in_sync = sum(item["state"] == IN_SYNC and item["connected"] for item in members)
        return (
            f"{in_sync} of at least {answer['min_in_sync']} replicas are in sync: writes wait "
            "until there are enough, or until `blockd volume set --min-in-sync` asks for fewer"
        )
    return answer.get("held") or answer.get("paused")


def record_health(volume: Volume, record: Record | None, replicas: list[Replica]) -> str:
    """The health of a volume no daemon runs for: a copy that cannot be opened does not count."""
    if record is None:
        return "unknown"
    failed = {item.metadata.name for item in replicas if item.status.state == "failed"}
    in_sync = sum(
        member.state == IN_SYNC and uid not in failed for uid, member in record.members.items()
    )
    if in_sync == 0:
        return "faulted"
    wanted = max(volume.spec.replicas, len(record.members))
    return "healthy" if in_sync >= wanted else "degraded"


def _rebuilds(answer: Answer) -> bool:
    """True if the volume daemon rebuilds a member; the record may not say so yet."""
    return any(item.get("rebuild") is not None for item in answer.get("members", []))


def _revert_waits(volume: Volume) -> bool:
    return volume.spec.revert is not None and volume.spec.revert.id != volume.status.revert_id


def _directories(context: Context, volume: Volume) -> set[Path]:
    name = volume.metadata.name
    return {
        context.home.socket_directory(name, volume.metadata.uid),
        context.home.volume_directory(name),
        context.home.replicas_directory(name),
    }


def _drop_finalizers(volume: Volume) -> None:
    volume.metadata.finalizers = []
