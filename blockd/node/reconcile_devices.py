"""Devices and mounts: the front end of an attached volume, and the file system on it.

What is up is read from the kernel each time. Four cases need care:

- A device that lost its volume daemon: a front end that reconnects gives it to the next one, before
  anything else touches the device, because until then all I/O waits. Any other device fails all I/O
  for good: it is unmounted, taken down and made anew. If something still uses it, that is said and
  tried again.
- A volume that could only be opened without writes its user believes in: the device is cut off.
- An administrator who unmounts by hand wants it unmounted: the wish to mount is dropped. That is
  only concluded while the device is still the one it was mounted from.
- What something uses is never taken away: ConflictError names who.
"""

from __future__ import annotations

import time

from blockd.frontends import FRONT_ENDS, choose
from blockd.frontends.base import Attachment, FrontEnd
from blockd.node import control, links, mounts
from blockd.node.context import Context, log
from blockd.node.objects import Volume, VolumeStatus
from blockd.node.store import modify, modify_status
from protocol.errors import BlockdError, ConflictError

CLIENTS_GONE_SECONDS = 2.0  # a client that has just ended is noticed within milliseconds
POLL_SECONDS = 0.05


def no_device_text(name: str, front_end: str) -> str:
    """Why a volume cannot be mounted, and what helps."""
    text = f"volume {name} cannot be mounted: front end {front_end} gives no device"
    reason = FRONT_ENDS["fuse"].unavailable()
    if reason is not None:
        return f"{text}, and fuse cannot be used here: {reason}"
    return f"{text}; detach it (`blockd volume detach {name}`) and attach it with --frontend fuse"


def server_of(volume: Volume) -> int | None:
    """The process that serves the volume's device, if I/O waits for the next one when it ends."""
    front_end = volume.status.frontend
    return volume.status.pid if front_end and FRONT_ENDS[front_end].reconnects else None


class DeviceReconciler:
    """Front end and mount of one volume after another."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def is_alive(self, volume: Volume) -> bool:
        """Is there a device whose user goes on when the volume daemon dies, and waits for one?"""
        front_end, found = self._find(volume, volume.status.epoch)
        return _waits(front_end, found)

    def cut_off(self, volume: Volume) -> None:
        """End such a device although it is used: I/O errors in place of an older state."""
        front_end, found = self._find(volume, volume.status.epoch)
        if front_end is not None and found is not None and _waits(front_end, found):
            front_end.cut_off(self._context.target(volume, volume.status.epoch))
            log.warning("volume %s: %s is cut off", volume.metadata.name, found.device)

    def settle_down(self, volume: Volume, epoch: int) -> Volume:
        """Take down what is not wanted (any more) or does not work (any more)."""
        front_end, found = self._find(volume, epoch)
        if front_end is not None and _waits(front_end, found):
            self._revive(volume, front_end, epoch)
        if not volume.spec.attached:
            return self.take_down(volume, epoch)
        if front_end is None:
            return volume
        if found is None or found.stale:
            if found is not None:
                log.warning(
                    "volume %s: %s lost its volume daemon and is made anew",
                    volume.metadata.name,
                    found.device,
                )
            return self.take_down(volume, epoch)
        wanted = volume.spec.mount
        if volume.status.mount and (wanted is None or wanted.path != volume.status.mount):
            volume = self.unmount(volume)
        return volume

    def _revive(self, volume: Volume, front_end: FrontEnd, epoch: int) -> None:
        """Give a device that outlived its volume daemon to the one that serves now."""
        target = self._context.served_target(volume, epoch)
        device = front_end.attach(target).device
        if not target.device_connections:
            log.info("volume %s: %s reconnected", volume.metadata.name, device)

    def bring_up(self, volume: Volume, epoch: int) -> Volume:
        """Make the device and mount it, as far as the spec wants that."""
        front_end = choose(volume.status.frontend or volume.spec.frontend)
        target = self._context.served_target(volume, epoch)
        if volume.status.state != "attached":
            volume = self._note(volume, frontend=front_end.name, state="attaching")
        device = front_end.attach(target).device
        uri = target.nbd_uri
        if device is not None:
            links.make(target.export, device, attached_now=volume.status.device != device)
        if volume.status.state != "attached" or volume.status.device != device:
            log.info("volume %s: attached, %s", volume.metadata.name, device or uri)
        volume = self._note(
            volume, frontend=front_end.name, state="attached", device=device, nbd_uri=uri
        )
        if volume.spec.mount is not None:
            if device is None:
                raise ConflictError(no_device_text(volume.metadata.name, front_end.name))
            volume = self._mount(volume, device)
        return volume

    def take_down(self, volume: Volume, epoch: int, *, force: bool = False) -> Volume:
        """Unmount and detach."""
        front_end, found = self._find(volume, epoch)
        if front_end is None:
            return volume
        volume = self._note(volume, state="detaching")
        if not force and not volume.spec.attached and front_end.name == "socket":
            refuse_with_clients(self._context, volume)
        volume = self.unmount(volume)
        if found is not None:
            front_end.detach(self._context.target(volume, epoch))
            wait_until_let_go(self._context, volume)
        links.remove(volume.metadata.name, volume.status.device)
        log.info("volume %s: detached", volume.metadata.name)
        return self._note(volume, frontend=None, device=None, nbd_uri=None, state="detached")

    def unmount(self, volume: Volume) -> Volume:
        """Unmount what this service mounted."""
        path = volume.status.mount
        if path is None:
            return volume
        mounts.unmount(volume.metadata.name, path, server_of(volume))
        log.info("volume %s: unmounted from %s", volume.metadata.name, path)
        return self._note(volume, mount=None)

    def _mount(self, volume: Volume, device: str) -> Volume:
        wanted, name = volume.spec.mount, volume.metadata.name
        assert wanted is not None
        where = mounts.mounted_at(device)
        if volume.status.mount == wanted.path:
            if wanted.path in where:
                return volume
            log.info("volume %s: unmounted by hand from %s", name, wanted.path)
            modify(self._context.store, Volume, name, lambda v: setattr(v.spec, "mount", None))
            return self._note(volume, mount=None)
        if where and wanted.path not in where:
            raise ConflictError(
                f"volume {name} ({device}) is mounted at {where[0]} already; "
                f"unmount it there first: umount {where[0]}"
            )
        made = mounts.mount(name, device, wanted.path, wanted.fs, server_of(volume))
        log.info(
            "volume %s: %smounted at %s",
            name,
            f"new {wanted.fs} file system, " if made else "",
            wanted.path,
        )
        return self._note(volume, mount=wanted.path)

    def _find(self, volume: Volume, epoch: int) -> tuple[FrontEnd | None, Attachment | None]:
        """The front end the volume has, and what of it is up."""
        if volume.status.frontend is None:
            return None, None
        front_end = FRONT_ENDS[volume.status.frontend]
        return front_end, front_end.find(self._context.target(volume, epoch))

    def _note(self, volume: Volume, **changes: object) -> Volume:
        def change(item: Volume) -> None:
            for field_name, value in changes.items():
                assert field_name in VolumeStatus.__struct_fields__
                setattr(item.status, field_name, value)

        return modify_status(self._context.store, Volume, volume.metadata.name, change)


def _waits(front_end: FrontEnd | None, found: Attachment | None) -> bool:
    """Does I/O of this device wait for a volume daemon when there is none?"""
    return bool(front_end and front_end.reconnects and found and not found.stale)


def wait_until_let_go(context: Context, volume: Volume) -> None:
    """Until the volume daemon, too, has seen that the kernel's device is gone."""
    deadline = time.monotonic() + CLIENTS_GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            if not context.served_target(volume, volume.status.epoch).device_connections:
                return
        except BlockdError:
            return  # no daemon, no connection
        time.sleep(POLL_SECONDS)


def refuse_with_clients(context: Context, volume: Volume, snapshot: str = "") -> None:
    """ConflictError while NBD clients are connected to a volume, or to one of its snapshots."""
    path = context.volume_daemon(volume, []).control
    what = context.target(volume, volume.status.epoch, snapshot).what
    deadline = time.monotonic() + CLIENTS_GONE_SECONDS
    while True:
        try:
            status = control.status(path)
        except BlockdError:
            return  # no daemon, no clients
        places = [item for item in status["snapshots"] if item["name"] == snapshot]
        count = sum(int(place["connections"]) for place in (places if snapshot else [status]))
        if count == 0:
            return
        if time.monotonic() > deadline:
            raise ConflictError(
                f"{what} is in use by {count} NBD connection{'s' if count > 1 else ''}; close "
                "them and detach again"
            )
        time.sleep(POLL_SECONDS)
