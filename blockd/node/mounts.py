"""File systems on attached devices: make one on a blank device, mount, unmount.

A device is formatted only if it is blank: no signature blkid knows, and zeros where file systems
and partition tables keep theirs. Anything else is mounted as what it is, or refused.
"""

from __future__ import annotations

import os
from pathlib import Path

from blockd.frontends import processes, tools
from protocol.errors import ConflictError, RequestError, StorageError

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


def mount(volume: str, device: str, path: str, fs: str) -> bool:
    """Mount `device` at `path`, with a new file system if it is blank; True if it got one."""
    if path in mounted_at(device):
        return False
    for entry in processes.mounts():
        if entry.path == path:
            raise ConflictError(
                f"{path} is the mount point of {entry.source} already; choose another directory"
            )
    found = _content(device)
    made = found is None
    if found is None:
        _make_file_system(device, fs)
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
    tools.run("mount", ["-t", found, device, path])
    return made


def unmount(volume: str, path: str) -> None:
    """Unmount `path`; ConflictError while something uses it."""
    if not any(entry.path == path for entry in processes.mounts()):
        return
    done = tools.attempt("umount", [path])
    if done.returncode != 0 and any(entry.path == path for entry in processes.mounts()):
        raise ConflictError(
            f"volume {volume} cannot be unmounted from {path}: it is in use by "
            f"{processes.users_text(path)}; close it and try again"
        )


def write_back(device: str) -> None:
    """Have the kernel write to the device what its file systems keep in memory."""
    for path in mounted_at(device):
        tools.run("sync", ["--file-system", path])


def _content(device: str) -> str | None:
    """The file system on a device, None if the device is blank, ConflictError for other data."""
    done = tools.attempt("blkid", ["--probe", "--output", "export", device])
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
    try:
        with open(device, "rb") as file:
            head = file.read(BLANK_CHECK_BYTES)
    except OSError as error:
        raise StorageError(
            f"{device} cannot be read: {error.strerror}; see the logs of the volume's daemons"
        ) from error
    if head.count(0) != len(head):
        raise ConflictError(
            f"{device} is not blank and holds no known file system; it is not formatted: "
            f"make one by hand if its data may go, such as mkfs.ext4 {device}"
        )
    return None


def _make_file_system(device: str, fs: str) -> None:
    arguments = {"ext4": ["-q", "-F"], "xfs": ["-q"]}[fs]
    tools.run(f"mkfs.{fs}", [*arguments, device])
