"""The `nbd-client` front end: the kernel's NBD client, set up by the program nbd-client.

    kernel -> /dev/nbdN -> unix socket -> volume daemon

For kernels whose nbd driver has no netlink family or no backend identifiers (before 5.14): the
program uses the older ioctl interface and stays as long as the device does. The kernel shows its
pid in sysfs, and its command line says whose device it is.

Nothing connects such a device again: with its volume daemon it is lost, like a `fuse` device, and
is taken down and made anew (see made_for.py). It does not grow while it is attached.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from blockd.frontends import made_for, processes, tools
from blockd.frontends.base import Attachment, Target
from blockd.frontends.busy import open_alone, refuse_if_used
from blockd.frontends.nbd import driver_lacks
from protocol.errors import ConflictError, StateError

START_SECONDS = 15.0
END_SECONDS = 15.0
POLL_SECONDS = 0.02
TOOL = "nbd-client"
_SYS_BLOCK = Path("/sys/block")


class NbdToolFrontEnd:
    """A device of the kernel's nbd driver that a process keeps up."""

    name = "nbd-client"
    reconnects = False

    def unavailable(self) -> str | None:
        return driver_lacks() or tools.missing(TOOL)

    def find(self, target: Target) -> Attachment | None:
        daemon, device = made_for.noted(target)
        if device is None:
            return None  # none was made, or it is of another front end
        return Attachment(device, stale=daemon != target.daemon or not _is_up(target, device))

    def attach(self, target: Target) -> Attachment:
        found = self.find(target)
        if found is not None and not found.stale:
            return found
        if found is not None:
            self.detach(target)
        refusals = []
        for index in _free_indexes():
            device = f"/dev/nbd{index}"
            made_for.note(target, device)
            done = tools.attempt(TOOL, _arguments(target, device))
            if done.returncode == 0:
                _wait_until_up(target, device)
                return Attachment(device)
            refusals.append(f"{device}: {(done.stderr or done.stdout).strip()}")
            made_for.forget(target)
        text = "; ".join(refusals) or "none is free; load the module with more: nbds_max="
        raise StateError(f"{target.what}: no nbd device could be set up: {text}")

    def detach(self, target: Target) -> None:
        _, device = made_for.noted(target)
        if device is None:
            return
        pid = _keeper(device)
        ours = _is_up(target, device)
        if pid is None or ours:  # else it is somebody else's by now
            refuse_if_used(target, device, keeper=pid)
        if pid is not None and ours:
            tools.run(TOOL, ["-d", device])
            if not processes.wait_for_end(pid, END_SECONDS):
                raise ConflictError(
                    f"{target.what}: nbd-client (pid {pid}) of {device} has not ended within "
                    f"{END_SECONDS:g} s; close what has the device open and detach again"
                )
        made_for.forget(target)

    def cut_off(self, target: Target) -> None:
        raise AssertionError("a device of nbd-client does not outlive its volume daemon")


def _arguments(target: Target, device: str) -> list[str]:
    arguments = ["-unix", str(target.nbd_socket), device, "-name", target.export]
    arguments += ["-block-size", str(target.block_size), "-nonetlink"]
    return [*arguments, *(["-readonly"] if target.read_only else [])]


def _free_indexes() -> list[int]:
    """Devices that are not set up, and from which nothing of an earlier time is still mounted."""
    names = [entry.name.removeprefix("nbd") for entry in _SYS_BLOCK.glob("nbd*")]
    return [
        index
        for index in sorted(int(name) for name in names if name.isdigit())
        if not (_SYS_BLOCK / f"nbd{index}" / "pid").exists() and open_alone(f"/dev/nbd{index}") == 0
    ]


def _keeper(device: str) -> int | None:
    """The process that keeps a device up, None if it is down."""
    try:
        return int((_SYS_BLOCK / Path(device).name / "pid").read_text())
    except (OSError, ValueError):
        return None


def _is_up(target: Target, device: str) -> bool:
    """Is it kept up by an nbd-client for this target?"""
    try:
        words = Path(f"/proc/{_keeper(device)}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    wanted = [os.fsencode(target.nbd_socket), target.export.encode(), device.encode()]
    return all(word in words for word in wanted)


def _wait_until_up(target: Target, device: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _is_up(target, device):
        if time.monotonic() > deadline:
            raise StateError(
                f"{target.what}: nbd-client has not brought {device} up within "
                f"{START_SECONDS:g} s; see the kernel log"
            )
        time.sleep(POLL_SECONDS)
