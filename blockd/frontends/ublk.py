"""The `ublk` front end: a block device that the volume daemon serves itself, without a socket.

    kernel -> /dev/ublkbN -> io_uring -> volume daemon

The volume daemon makes, serves and removes the device (blockd/daemons/ublk.py); here it is asked.
The device is known by the mark it carries in the kernel (blockd/kernel/ublk.py), so nothing is
remembered and a reboot or a reused number cannot mislead.

The device outlives the volume daemon: the kernel keeps its requests, those under way included,
until the next volume daemon has been asked to `attach`. Without a volume daemon, `detach` and
`cut_off` remove it from here.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from blockd.frontends import tools
from blockd.frontends.base import Attachment, Target
from blockd.frontends.busy import refuse_if_used
from blockd.kernel import ublk
from blockd.node import control
from protocol.errors import PeerError, StateError

MODULE = "ublk_drv"
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")  # 0, 1 (only root may), 2


class UblkFrontEnd:
    """A device of the kernel's ublk driver."""

    name = "ublk"
    reconnects = True

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # mark to number: where to look first

    def unavailable(self) -> str | None:
        if os.geteuid() != 0:
            return "it needs root (kernel devices); the socket front end does not"
        try:
            if int(IO_URING_DISABLED.read_text()) > 1:
                return f"io_uring is disabled; echo 0 > {IO_URING_DISABLED}"
        except OSError:
            pass  # kernels before 6.6 have no such switch
        if not os.path.exists(ublk.CONTROL):
            reason = _load_module()
            if not os.path.exists(ublk.CONTROL):
                return f"{ublk.CONTROL} does not exist: {reason}"
        try:
            with ublk.Control() as driver:
                driver.features()
        except OSError as error:
            return f"the ublk driver cannot be used (kernel 6.5 or newer is needed): {error}"
        return None

    def find(self, target: Target) -> Attachment | None:
        found = self._device(target)
        if found is None:
            return None
        if found.state == ublk.DEAD:  # never started, or stopped: no block device
            return Attachment(None, stale=True)
        return Attachment(found.path)

    def attach(self, target: Target) -> Attachment:
        answer = control.ask(target.control, "ublk-attach", snapshot=_snapshot(target))
        return Attachment(str(answer["path"]))

    def detach(self, target: Target) -> None:
        found = self._device(target)
        if found is None:
            return
        refuse_if_used(target, found.path)
        try:
            control.ask(target.control, "ublk-detach", snapshot=_snapshot(target))
        except PeerError:  # no volume daemon: nobody serves the device
            self._remove(found)

    def cut_off(self, target: Target) -> None:
        found = self._device(target)
        if found is None:
            return
        try:
            with ublk.Control() as driver:
                driver.stop(found.id)
        except OSError as error:
            raise StateError(f"{found.path} cannot be stopped: {error}") from None

    def _device(self, target: Target) -> ublk.Info | None:
        if not os.path.exists(ublk.CONTROL):
            return None
        mark = ublk.mark_of(target.identity)
        try:
            with ublk.Control() as driver:
                found = driver.find(mark, self._last.get(mark))
        except OSError as error:
            raise StateError(f"{ublk.CONTROL} cannot be asked for devices: {error}") from None
        if found is not None:
            self._last[mark] = found.id
        else:
            self._last.pop(mark, None)
        return found

    def _remove(self, found: ublk.Info) -> None:
        try:
            with ublk.Control() as driver:
                driver.stop(found.id)
                driver.delete(found.id)
        except OSError as error:
            raise StateError(f"{found.path} cannot be removed: {error}") from None


def _snapshot(target: Target) -> str:
    return target.export.partition("@")[2]


@functools.cache
def _load_module() -> str:
    """Try it, once per process; what there is to say if the driver is still not there."""
    if tools.path_of("modprobe") is None:
        return f"kernel module {MODULE} is not loaded, and modprobe is not installed (kmod)"
    done = tools.attempt("modprobe", [MODULE])
    words = done.stderr.strip().splitlines()
    return f"modprobe {MODULE}: {words[-1] if words else 'it brought no device'}"
