"""Runs the system's own programs, and says which Debian package brings a missing one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from protocol.errors import StateError

TOOL_SECONDS = 300.0  # an unmount first writes back what the page cache holds of the volume

PACKAGES = {
    "nbdfuse": "libnbd-bin",  # in newer releases a package of its own, nbdfuse
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "blkid": "util-linux",
    "stat": "coreutils",
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


def attempt(tool: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its exit code."""
    try:
        return subprocess.run(
            [require(tool), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolError(
            f"{tool} {' '.join(arguments)} did not end within {TOOL_SECONDS:g} s; "
            "the device may hang: see the kernel log"
        ) from None


def run(tool: str, arguments: Sequence[str]) -> str:
    """Run a program that must succeed; what it printed."""
    done = attempt(tool, arguments)
    if done.returncode != 0:
        words = done.stderr.strip() or done.stdout.strip() or "it said nothing"
        raise ToolError(f"{tool} {' '.join(arguments)} failed with code {done.returncode}: {words}")
    return done.stdout
