"""What the node service does once at its start: forget what a reboot has ended, then wait until the
volumes that should be attached are.

Statuses outlive a reboot, the kernel's devices and mounts do not. A status that goes on saying
"mounted" would be read as "unmounted by hand since", which drops the wish to mount; or as leave to
unmount what somebody else has mounted there since; and device names are given out anew. So the
first start on another boot forgets all of that, before the first pass over any volume. What the
user wants (the specs) stays, and the passes make it so again. The times since which replicas were
missing are forgotten too: a machine that was off for hours does not begin by replacing replicas.

Nothing is forgotten while either boot id is unknown.
"""

from __future__ import annotations

import threading
import time

from blockd.node.context import log
from blockd.node.objects import Node, Replica, Snapshot, Volume
from blockd.node.store import Store, find, modify_status
from snapshots.metadata import boot_id

SETTLE_SECONDS = 60.0  # volumes that take longer do not hold up the machine's start
POLL_SECONDS = 0.1


def forget_other_boot(store: Store, node: str) -> str:
    """Forget what a reboot has ended; this boot's id, to be noted after that and not before."""
    now = boot_id()
    known = find(store, Node, node)
    before = known.status.boot_id if known is not None else ""
    if not before or not now or before == now:
        return now or before
    log.info("the machine was rebooted: what was attached and mounted is made anew")
    for volume in store.list(Volume):
        modify_status(store, Volume, volume.metadata.name, _forget_volume)
    for snapshot in store.list(Snapshot):
        modify_status(store, Snapshot, snapshot.metadata.name, _forget_snapshot)
    for replica in store.list(Replica):
        modify_status(store, Replica, replica.metadata.name, _forget_replica)
    return now


def _forget_volume(volume: Volume) -> None:
    status = volume.status
    status.frontend = status.device = status.nbd_uri = status.mount = None
    status.pid = status.short_since = status.message = status.problem = None
    status.health = "unknown"
    if status.established:
        status.state = "detached"


def _forget_snapshot(snapshot: Snapshot) -> None:
    status = snapshot.status
    status.frontend = status.device = status.nbd_uri = None


def _forget_replica(replica: Replica) -> None:
    replica.status.pid = replica.status.failed_since = None


def wait_until_settled(store: Store, stop: threading.Event) -> None:
    """Until each volume is attached and mounted as wanted, or cannot be, or it takes too long."""
    deadline = time.monotonic() + SETTLE_SECONDS
    waiting = {volume.metadata.name for volume in store.list(Volume)}
    while waiting and not stop.is_set() and time.monotonic() < deadline:
        waiting = {name for name in waiting if not _is_settled(find(store, Volume, name))}
        if waiting:
            stop.wait(POLL_SECONDS)
    if waiting and not stop.is_set():
        log.warning("not attached yet, still trying: %s", ", ".join(sorted(waiting)))


def _is_settled(volume: Volume | None) -> bool:
    if volume is None or not volume.spec.attached or volume.metadata.deleted is not None:
        return True
    problem = volume.status.problem
    if problem is not None and not problem.retry:
        return True
    mount = volume.spec.mount
    mounted = mount is None or volume.status.mount == mount.path
    return volume.status.state == "attached" and mounted
