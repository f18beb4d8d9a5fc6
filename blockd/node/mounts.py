"""File systems on attached devices: make one on a blank device, mount, unmount.

A device is formatted only if it is blank: no signature blkid knows, and zeros where file systems
and partition tables keep theirs. Anything else is mounted as what it is, or refused.

Everything that may wait for the device is a process of its own. `server` is the process that serves
the device, if the device outlives it: see tools.attempt.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from blockd.frontends import processes, tools
from blockd.frontends.busy import open_alone
from protocol.errors import ConflictError, RequestError, StateError, StorageError

FILE_SYSTEMS = ("ext4", "xfs")
BLANK_CHECK_BYTES = 1 << 20  # superblocks and partition tables are within the first MiB
_BLKID_NOTHING_FOUND = 2


def check_file_system(fs: str) -> str:
    """Return `fs` if it can be made here, else raise RequestError."""
    if fs not in FILE_SYSTEMS:
        raise RequestError(
            f"file system {fs!r} is not supported; choose {' or '.join(FILE_SYSTEMS)}"
        )
    return fs


def mounted_at(device: str) -> list[str]:
    """Where the device is mounted."""
    return [mount.path for mount in processes.mounts() if mount.source == device]


def mount(volume: str, device: str, path: str, fs: str, server: int | None = None) -> bool:
    """Mount `device` at `path`, with a new file system if it is blank; True if it got one."""
    if path in mounted_at(device):
        return False
    for entry in processes.mounts():
        if entry.path == path:
            raise ConflictError(
                f"{path} is the mount point of {entry.source} already; choose another directory"
            )
    _refuse_if_held(volume, device)
    found = _content(device, server)
    made = found is None
    if found is None:
        _make_file_system(device, fs, server)
        found = fs
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"mount point {path} cannot be made: {error.strerror}") from None
    if os.listdir(path):
        raise ConflictError(
            f"mount point {path} is not empty: the files there would be hidden; "
            "choose another directory"
        )
    tools.run("mount", ["-t", found, device, path], server=server)
    return made


def unmount(volume: str, path: str, server: int | None = None) -> None:
    """Unmount `path`; ConflictError while something uses it."""
    if not any(entry.path == path for entry in processes.mounts()):
        return
    done = tools.attempt("umount", [path], server=server)
    if done.returncode != 0 and any(entry.path == path for entry in processes.mounts()):
        raise ConflictError(
            f"volume {volume} cannot be unmounted from {path}: it is in use by "
            f"{processes.users_text(path)}; close it and try again"
        )


def write_back(device: str, server: int | None = None) -> None:
    """Have the kernel write to the device what its file systems keep in memory."""
    for path in mounted_at(device):
        tools.run("sync", ["--file-system", path], server=server)


def _refuse_if_held(volume: str, device: str) -> None:
    """StateError while a program has the device for itself: mkfs of an earlier attempt."""
    if open_alone(device) == errno.EBUSY:
        raise StateError(
            f"volume {volume} ({device}) is in use by {processes.users_text(device)}; it is "
            "mounted when that is done"
        )


def _content(device: str, server: int | None) -> str | None:
    """The file system on a device, None if the device is blank, ConflictError for other data."""
    done = tools.attempt("blkid", ["--probe", "--output", "export", device], server=server)
    if done.returncode == 0:
        fields = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        if "TYPE" in fields:
            return fields["TYPE"]
        raise ConflictError(
            f"{device} holds no file system but {', '.join(sorted(fields)) or 'something else'}; "
            "it is not touched: mount what is on it by hand"
        )
    if done.returncode != _BLKID_NOTHING_FOUND:
        raise ConflictError(
            f"{device} holds data blkid cannot tell apart (code {done.returncode}); it is not "
            "touched: mount what is on it by hand"
        )
    read = tools.attempt("head", [f"--bytes={BLANK_CHECK_BYTES}", device], server=server)
    if read.returncode != 0:
        raise StorageError(
            f"{device} cannot be read: {read.stderr.strip()}; see the logs of the volume's daemons"
        )
    if read.stdout.strip("\0"):
        raise ConflictError(
            f"{device} is not blank and holds no known file system; it is not formatted: "
            f"make one by hand if its data may go, such as mkfs.ext4 {device}"
        )
    return None


def _make_file_system(device: str, fs: str, server: int | None) -> None:
    arguments = {"ext4": ["-q", "-F"], "xfs": ["-q"]}[fs]
    tools.run(f"mkfs.{fs}", [*arguments, device], server=server)
