"""Stable names of devices: /dev/blockd/VOLUME and /dev/blockd/VOLUME@SNAPSHOT, as symbolic links.

Made and removed by the node service, not by udev. A link that leads nowhere, left by a reboot or a
crash, is replaced; one that leads to a living device is replaced only when that device is attached.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from blockd.node.context import log

DIRECTORY = Path("/dev/blockd")


def make(name: str, device: str, *, attached_now: bool) -> None:
    """See that /dev/blockd/NAME leads to `device`; a name is not worth failing for."""
    path = DIRECTORY / name
    if not attached_now and _leads_to_a_device(path):
        return
    temporary = DIRECTORY / f".{name}.new"
    try:
        DIRECTORY.mkdir(mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(device)
        temporary.replace(path)
    except OSError as error:
        if attached_now:
            log.warning("%s: no link to %s: %s", path, device, error.strerror)


def remove(name: str, device: str | None) -> None:
    """Remove /dev/blockd/NAME if it leads to `device`, or nowhere."""
    path = DIRECTORY / name
    with contextlib.suppress(OSError):
        if os.readlink(path) == device or not _leads_to_a_device(path):
            path.unlink()
            DIRECTORY.rmdir()  # stays while there are others


def _leads_to_a_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
