"""Runs the system's own programs, and says which Debian package brings a missing one."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from blockd.frontends import processes
from protocol.errors import StateError

TOOL_SECONDS = 300.0  # an unmount first writes back what the page cache holds of the volume

PACKAGES = {
    "nbd-client": "nbd-client",
    "nbdfuse": "libnbd-bin",  # in newer releases a package of its own, nbdfuse
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "blkid": "util-linux",
    "stat": "coreutils",
    "head": "coreutils",
    "sh": "dash",
    "sync": "coreutils",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "modprobe": "kmod",
    "qemu-img": "qemu-utils",
}
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


class ToolError(StateError):
    """A program of the system is missing or failed; the same call will fail again."""

    retry = False


def path_of(tool: str) -> str | None:
    """Where a program is, None if it is not installed."""
    return shutil.which(tool) or shutil.which(tool, path=_SBIN)


def missing(*tools: str) -> str | None:
    """One sentence naming the programs that are not installed, None if all are there."""
    absent = [tool for tool in tools if path_of(tool) is None]
    if not absent:
        return None
    packages = sorted({PACKAGES[tool] for tool in absent})
    return f"{', '.join(absent)} not installed; apt-get install {' '.join(packages)}"


def require(tool: str) -> str:
    """Where a program is, or ToolError."""
    found = path_of(tool)
    if found is None:
        raise ToolError(f"{tool} is not installed; apt-get install {PACKAGES[tool]}")
    return found


def attempt(
    tool: str, arguments: Sequence[str], *, server: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its exit code.

    `server` is the process that serves the device the program uses: when that ends, the program
    stands still until somebody gives the device to the next one. That may be for the caller to do,
    so it is not kept waiting: StateError, and the program goes on when it can.
    """
    command = [require(tool), *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _wait(child, server)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(command, child.returncode, *texts)


def _wait(child: subprocess.Popen[bytes], server: int | None) -> None:
    """Wait for the program; one that is left alone is collected whenever it ends."""
    what = " ".join(str(word) for word in child.args) if isinstance(child.args, list) else ""
    with contextlib.ExitStack() as stack:
        ends = select.poll()
        own = _pidfd(child.pid, stack)
        ends.register(own, select.POLLIN)
        try:
            if server is not None:
                ends.register(_pidfd(server, stack), select.POLLIN)
            ended = [fd for fd, _ in ends.poll(TOOL_SECONDS * 1000)]
        except ProcessLookupError:
            ended = [-1]
        if own in ended:
            child.wait()
            return
    processes.collect(child)
    if ended:
        raise StateError(f"the volume daemon ended while this ran, which now waits: {what}")
    child.kill()
    raise ToolError(
        f"{what} did not end within {TOOL_SECONDS:g} s; the device may hang: see the kernel log"
    )


def _pidfd(pid: int, stack: contextlib.ExitStack) -> int:
    descriptor = os.pidfd_open(pid)
    stack.callback(os.close, descriptor)
    return descriptor


def run(tool: str, arguments: Sequence[str], *, server: int | None = None) -> str:
    """Run a program that must succeed; what it printed."""
    done = attempt(tool, arguments, server=server)
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip() or "it said nothing"
        raise ToolError(f"{tool} {' '.join(arguments)} failed with code {done.returncode}: {words}")
    return done.stdout
