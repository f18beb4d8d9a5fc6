"""Is a device in use? What something uses is never taken away."""

from __future__ import annotations

import errno
import os

from blockd.frontends import processes
from blockd.frontends.base import Target
from protocol.errors import ConflictError


def open_alone(device: str) -> int:
    """0 if the device can be opened exclusively, else the errno of that.

    EBUSY while a mount, swap, another device or a program that asked for it alone holds it.
    """
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def refuse_if_used(target: Target, device: str, keeper: int | None = None) -> None:
    """ConflictError while a file system is mounted from the device or something holds it.

    `keeper` is a process that has it open and is no user.
    """
    where = [mount.path for mount in processes.mounts() if mount.source == device]
    if where:
        by_blockd = "" if target.read_only else f"`blockd volume umount {target.export}` or "
        raise ConflictError(
            f"{target.what} ({device}) is mounted at {', '.join(where)}; unmount it first: "
            f"{by_blockd}umount {where[0]}"
        )
    failure = open_alone(device)
    if failure == errno.EBUSY:
        raise ConflictError(
            f"{target.what} ({device}) is in use by {processes.users_text(device, keeper)}; "
            "close it and detach again"
        )
    if failure:  # the device's own error is no reason to stay
        return
    if processes.users_of(device, keeper):
        raise ConflictError(
            f"{target.what} ({device}) is open in {processes.users_text(device, keeper)}; "
            "close it and detach again"
        )
