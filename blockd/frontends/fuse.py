"""The `fuse` front end: nbdfuse shows the volume as a file, a loop device makes it a block device.

    kernel -> /dev/loopN -> VOLUME_DIRECTORY/device (FUSE) -> nbdfuse -> NBD socket -> volume daemon

Works where the kernel has neither the nbd nor the ublk driver. FLUSH and TRIM pass through: the
loop driver turns them into fsync and fallocate on the file. O_DIRECT on the loop device keeps the
data out of the page cache a second time.

nbdfuse does not connect again. After the volume daemon ended, the device fails all I/O until it
is taken down; a note says which daemon it was made for (made_for.py), so that is seen after a
restart of the node service too.

The mounted file is never stat'ed in this process: a hung server would hang it. /proc/mounts and
/sys/block tell all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from blockd.frontends import made_for, processes, tools
from blockd.frontends.base import Attachment, Target
from blockd.frontends.busy import refuse_if_used
from protocol.errors import ConflictError

START_SECONDS = 15.0  # nbdfuse connects, then mounts: tens of milliseconds
END_SECONDS = 15.0
POLL_SECONDS = 0.02
TOOLS = ("nbdfuse", "stat", "losetup", "umount")


class FuseFrontEnd:
    """A loop device on a FUSE file."""

    name = "fuse"
    reconnects = False

    def unavailable(self) -> str | None:
        if os.geteuid() != 0:
            return "it needs root (loop devices); the socket front end does not"
        absent = tools.missing(*TOOLS)
        if absent is not None:
            return absent
        for node in ("/dev/fuse", "/dev/loop-control"):
            if not os.path.exists(node):
                return f"{node} does not exist on this machine; the kernel lacks that driver"
        return None

    def find(self, target: Target) -> Attachment | None:
        file = _file(target)
        device = _loop_device(file)
        mounted = _is_mounted(file)
        if device is None and not mounted:
            return None
        stale = device is None or not mounted or made_for.noted(target)[0] != target.daemon
        return Attachment(device, stale=stale or _nbdfuse_ended(target))

    def attach(self, target: Target) -> Attachment:
        file = _file(target)
        found = self.find(target)
        if found is not None and not found.stale:
            return found
        if found is not None:
            self.detach(target)
        made_for.note(target)
        _start_nbdfuse(target, file)
        # Kernels before 6.17 make the loop device as long as they last heard that the file is, and
        # of a file that nobody has looked at they have heard nothing.
        tools.run("stat", ["--format=%s", str(file)])
        arguments = ["--find", "--show", "--direct-io=on"]
        arguments += ["--read-only"] if target.read_only else []
        arguments += ["--sector-size", str(target.block_size), str(file)]
        device = tools.run("losetup", arguments).strip()
        return Attachment(device)

    def detach(self, target: Target) -> None:
        file = _file(target)
        device = _loop_device(file)
        if device is not None:
            refuse_if_used(target, device)
            tools.run("losetup", ["--detach", device])
            _wait_for_loop_end(target, file, device)
        if _is_mounted(file):
            _unmount_file(target, file)
        _wait_for_nbdfuse_end(target)
        for path in (file, _pid_path(target)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        made_for.forget(target)

    def cut_off(self, target: Target) -> None:
        raise AssertionError("a fuse device does not outlive its volume daemon")


def _file(target: Target) -> Path:
    return target.directory / "device"


def _pid_path(target: Target) -> Path:
    return target.directory / "nbdfuse.pid"


def _is_mounted(file: Path) -> bool:
    return any(mount.path == str(file) for mount in processes.mounts())


def _loop_device(file: Path) -> str | None:
    """The loop device on `file`, None if there is none."""
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_text().rstrip("\n")
        except OSError:  # it was detached in this moment
            continue
        if backing == str(file):
            return f"/dev/{entry.parent.parent.name}"
    return None


def _nbdfuse_pid(target: Target) -> int | None:
    """The pid of this volume's nbdfuse, None if it has ended."""
    try:
        pid = int(_pid_path(target).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(_file(target)) in words else None


def _nbdfuse_ended(target: Target) -> bool:
    return _nbdfuse_pid(target) is None


def _start_nbdfuse(target: Target, file: Path) -> None:
    tools.require("losetup")
    program = tools.require("nbdfuse")
    file.touch(mode=0o600)
    with contextlib.suppress(FileNotFoundError):
        _pid_path(target).unlink()
    log = target.directory / "nbdfuse.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [program, "-P", str(_pid_path(target)), str(file), target.nbd_uri],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )
    processes.collect(child)
    deadline = time.monotonic() + START_SECONDS
    while not (_pid_path(target).exists() and _is_mounted(file)):
        if child.poll() is not None:
            words = log.read_text(errors="replace").strip()
            raise tools.ToolError(f"nbdfuse ended with code {child.returncode}: {words}")
        if time.monotonic() > deadline:
            child.kill()
            raise tools.ToolError(
                f"nbdfuse did not mount {file} within {START_SECONDS:g} s; see {log}"
            )
        time.sleep(POLL_SECONDS)


def _wait_for_loop_end(target: Target, file: Path, device: str) -> None:
    deadline = time.monotonic() + END_SECONDS
    while _loop_device(file) is not None:
        if time.monotonic() > deadline:
            raise ConflictError(
                f"{target.what} ({device}) is in use by {processes.users_text(device)}; it "
                "goes away when that closes it; detach again then"
            )
        time.sleep(POLL_SECONDS)


def _unmount_file(target: Target, file: Path) -> None:
    done = tools.attempt("umount", [str(file)])
    if done.returncode != 0 and _is_mounted(file):
        raise ConflictError(
            f"{target.what}: {file} cannot be unmounted ({done.stderr.strip()}); "
            "close what uses it and detach again"
        )


def _wait_for_nbdfuse_end(target: Target) -> None:
    """nbdfuse ends by itself once its file is unmounted; else it is told to."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        pid = _nbdfuse_pid(target)
        if pid is None or processes.wait_for_end(pid, 0):
            return
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if processes.wait_for_end(pid, END_SECONDS):
            return
    raise ConflictError(f"nbdfuse (pid {pid}) of {target.what} does not end")
