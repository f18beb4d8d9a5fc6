"""A file system that stands still for a moment, and never for longer.

A process of its own freezes it and thaws it when its standard input ends: when the caller is done,
and as well when the caller is killed. After FROZEN_SECONDS_MAX it thaws by itself, and the caller
is told that it did. Source: ioctl FIFREEZE and FITHAW, include/uapi/linux/fs.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

from protocol.errors import StateError, StorageError

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
FROZEN_SECONDS_MAX = 10.0  # writers wait meanwhile; a snapshot takes milliseconds
TOO_LONG = 3  # exit code: thawed before the caller was done


@contextlib.contextmanager
def frozen(path: str) -> Iterator[None]:
    """The file system mounted at `path` is frozen inside the block.

    Raises StorageError if it cannot be frozen, StateError if the block took too long: then what it
    did was not done on a frozen file system.
    """
    keeper = subprocess.Popen(
        [sys.executable, "-m", "blockd.node.freeze", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        if keeper.stdout.readline() != "frozen\n":
            reason = keeper.communicate()[1].strip()
            raise StorageError(f"the file system at {path} cannot be frozen: {reason}")
        yield
    finally:
        keeper.stdin.close()
        code = keeper.wait()
        thaw(path)  # had it been killed
        for pipe in (keeper.stdout, keeper.stderr):
            if pipe is not None:
                pipe.close()
    if code == TOO_LONG:
        raise StateError(
            f"the file system at {path} was thawed after {FROZEN_SECONDS_MAX:g} s, before this was "
            "done; try again when the volume is less busy"
        )


def thaw(path: str) -> None:
    """Thaw a file system if it is frozen."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, FITHAW, 0)
        finally:
            os.close(fd)


def main() -> int:
    """Freeze, wait for the end of standard input, thaw."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, FIFREEZE, 0)
    except OSError as error:
        busy = error.errno == errno.EBUSY
        print("somebody else has frozen it" if busy else error.strerror, file=sys.stderr)
        return 1
    try:
        with contextlib.suppress(BrokenPipeError):
            print("frozen", flush=True)
        ended = select.select([sys.stdin], [], [], FROZEN_SECONDS_MAX)[0]
    finally:
        fcntl.ioctl(fd, FITHAW, 0)
    return 0 if ended else TOO_LONG


if __name__ == "__main__":
    sys.exit(main())
