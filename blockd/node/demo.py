"""`blockd serve --demo`: a first volume, told step by step, and everything stopped at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blockd.frontends import FRONT_ENDS
from blockd.node.context import Context
from blockd.node.objects import Volume, VolumeSpec
from blockd.node.operations import Operations
from blockd.node.reconcile_devices import DeviceReconciler
from blockd.node.reconcile_snapshot_devices import SnapshotDeviceReconciler
from blockd.node.views import VolumeView
from protocol.errors import BlockdError, ConflictError, NotFoundError

VOLUME = "demo"
SIZE_BYTES = 1 << 30
WAIT_SECONDS = 120.0
BUSY_SECONDS = 20.0  # how long a busy mount is waited for at the end
POLL_SECONDS = 0.25


def say(text: str) -> None:
    """One line for the person who started this."""
    print(text, flush=True)


def show(
    operations: Operations, context: Context, addresses: list[str], stop: threading.Event
) -> None:
    """Make the demo volume if there is none, wait for what was attached, and tell all."""
    volumes = context.store.list(Volume)
    try:
        if not volumes:
            _make(operations)
        for volume in volumes:
            if volume.spec.attached:
                _step(f"attaching volume {volume.metadata.name}")
                _await_attached(operations, volume, stop)
    except BlockdError as error:
        say(f"  {error}")
    views = operations.volumes()
    say("")
    for view in views:
        _tell(view)
    say(f"API       {', '.join(addresses)}")
    if any(address.startswith("http") for address in addresses):
        say(f"token     in {context.home.token_path}")
    _tell_next(views, context)


def _make(operations: Operations) -> None:
    _step(f"creating volume {VOLUME} (1 GiB, 3 replicas)")
    operations.create(VOLUME, VolumeSpec(size_bytes=SIZE_BYTES), {}, WAIT_SECONDS)
    _step(f"attaching volume {VOLUME}")
    view = operations.attach(VOLUME, "auto", WAIT_SECONDS)
    if view.device is None:
        return
    _step("making an ext4 file system and mounting it")
    operations.mount(VOLUME, None, "ext4", WAIT_SECONDS)


def _await_attached(operations: Operations, volume: Volume, stop: threading.Event) -> None:
    name, deadline = volume.metadata.name, time.monotonic() + WAIT_SECONDS
    wants_mount = volume.spec.mount is not None
    while not stop.wait(POLL_SECONDS):
        view = operations.volume(name)
        attached = view.state == "attached"
        if attached and (view.mount is not None or view.device is None or not wants_mount):
            return
        if time.monotonic() > deadline:
            say(f"  volume {name} is {view.state}: {view.message}; still trying")
            return


def _step(text: str) -> None:
    say(f"{text} ...")


def _tell(view: VolumeView) -> None:
    good = sum(replica.state == "IN_SYNC" for replica in view.replicas)
    say(f"volume    {view.name}, {view.state}, {view.health} ({good} replicas in sync)")
    if view.device:
        say(f"device    {view.device} (front end {view.frontend})")
    elif view.nbd_uri:
        reason = FRONT_ENDS["fuse"].unavailable() if view.frontend == "socket" else None
        say(f"device    none (front end {view.frontend})" + (f": {reason}" if reason else ""))
        say(f"NBD       {view.nbd_uri}")
    if view.mount:
        say(f"mounted   {view.mount.path}")
    if view.message:
        say(f"note      {view.message}")


def _tell_next(views: list[VolumeView], context: Context) -> None:
    attached = next((view for view in views if view.state == "attached"), None)
    name = attached.name if attached else VOLUME
    say("\ntry in another terminal:")
    prefix = ".venv/bin/blockd"
    if context.home.root != Path(os.environ.get("BLOCKD_HOME") or "run").absolute():
        prefix += f" --home {context.home.root}"
    if attached and attached.mount:
        say(f"  cp -r /usr/share/doc {attached.mount.path}/")
    elif attached and attached.nbd_uri:
        say(f"  nbdinfo '{attached.nbd_uri}'")
    for command in (
        f"volume show {name}",
        f"snapshot create {name}@first",
        f"snapshot revert {name}@first --force-unmount",
        f"replica ls {name}",
    ):
        say(f"  {prefix} {command}")
    say("Ctrl-C unmounts, detaches and stops everything; the data stays.")


def stop_everything(context: Context, stop: threading.Event) -> bool:
    """Unmount, detach and stop all daemons, in that order; False if something had to stay."""
    say("\nstopping (Ctrl-C again: leave busy volumes running)")
    devices = DeviceReconciler(context)
    clean = True
    for volume in context.store.list(Volume):
        try:
            _stop_volume(context, devices, volume, stop)
        except NotFoundError:
            continue
        except BlockdError as error:
            say(f"  {error}")
            say(f"  volume {volume.metadata.name} goes on; the next start finds it")
            clean = False
    say("stopped; the data is kept" if clean else "stopped, but not everything")
    return clean


def _stop_volume(
    context: Context, devices: DeviceReconciler, volume: Volume, stop: threading.Event
) -> None:
    name = volume.metadata.name
    if volume.status.mount:
        _step(f"unmounting {volume.status.mount}")
    if volume.status.frontend is not None:
        _patiently(
            lambda: devices.take_down(
                context.store.get(Volume, name), volume.status.epoch, force=True
            ),
            stop,
        )
        say(f"volume {name} is detached")
    _patiently(lambda: SnapshotDeviceReconciler(context).take_all_down(volume), stop)
    context.supervisor.stop(context.volume_daemon(volume, []))
    daemons = [context.replica_daemon(volume, item) for item in context.replicas_of(name)]
    running = [daemon for daemon in daemons if context.supervisor.pid(daemon) is not None]
    for daemon in running:
        context.supervisor.stop(daemon)
    say(f"volume {name}: volume daemon and {len(running)} replica daemons stopped")


def _patiently(act: Callable[[], object], stop: threading.Event) -> None:
    """Do it, again while something is in use, until told to leave it."""
    deadline, told = time.monotonic() + BUSY_SECONDS, ""
    while True:
        try:
            act()
            return
        except ConflictError as error:
            if time.monotonic() > deadline or stop.is_set():
                raise
            if str(error) != told:
                say(f"  waiting: {error}")
                told = str(error)
        stop.wait(POLL_SECONDS)
