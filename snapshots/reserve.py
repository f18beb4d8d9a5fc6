"""A mebibyte of disk kept back, so that a full disk can be emptied again.

Deleting a snapshot, trimming, fencing and noting a member configuration all write a little first.
When one of these finds no space, the reserve is released, the step repeated, and the reserve filled
again as soon as there is room. Ordinary writes never touch it.
"""

from __future__ import annotations

import contextlib
import errno
import os

from snapshots.syscalls import allocate, storage_error

RESERVE_BYTES = 1 << 20  # a replica.json of 255 layers, some map blocks and a folding step
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """The open file `reserve` of a replica directory. Its content means nothing."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "reserve")
        self.fd = -1
        self._filled = False
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise storage_error("opening", self.path, error) from error
        self.refill()

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def release(self) -> None:
        """Give the space to whoever asks next."""
        try:
            os.ftruncate(self.fd, 0)  # a punch does not reach behind the end of a file on ext4
        except OSError as error:
            raise storage_error("releasing", self.path, error) from error
        self._filled = False

    def refill(self) -> bool:
        """Take the space back if there is any; whether the reserve is there."""
        if not self._filled:
            with contextlib.suppress(OSError):  # still full; tried again with the next flush
                allocate(self.fd, 0, RESERVE_BYTES)
                self._filled = True
        return self._filled
