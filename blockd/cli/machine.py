"""What this machine has and lacks of what blockd can use; needs no node service.

Each finding names one thing. `ok` is None where something is only worth knowing: nothing that is
asked for by default fails for want of it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from blockd.cli.output import size_text
from blockd.frontends import availability, tools

DEVICE_FRONT_ENDS = ("nbd", "ublk", "nbd-client", "fuse")  # those that give a block device
PYTHON_FIRST = (3, 11)
FREE_FRACTION_MIN = 0.05  # a fuller disk soon pauses writes
_IO_URING_SETUP = 425  # the same number on every architecture
_IO_URING_PARAMS_BYTES = 120


@dataclass(frozen=True)
class Finding:
    """One line: of what, is it as it should be, and what to do if not."""

    check: str
    ok: bool | None
    text: str


def examine(home: Path) -> list[Finding]:
    """All findings, in the order in which one would mend them."""
    front_ends = availability()
    found = [_python(), _root()]
    found += [
        Finding(f"front end {name}", reason is None or None, reason or "usable")
        for name, reason in front_ends.items()
    ]
    found += [
        _tools("mount", "mount", "umount", "blkid"),
        _tools("ext4", "mkfs.ext4"),
        _tools("xfs", "mkfs.xfs"),
        _tools("disk images", "qemu-img"),
        _space(home),
        _io_uring(),
        _memory_lock(),
    ]
    return found


def has_device_front_end(findings: list[Finding]) -> bool:
    """Can a volume become a block device here?"""
    names = {f"front end {name}" for name in DEVICE_FRONT_ENDS}
    return any(finding.ok for finding in findings if finding.check in names)


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info[:2] >= PYTHON_FIRST
    return Finding("Python", good, version if good else f"{version}; 3.11 or newer is needed")


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", True, "yes")
    return Finding("root", None, "no; block devices and mounts need it, NBD addresses do not")


def _tools(check: str, *names: str) -> Finding:
    missing = tools.missing(*names)
    return Finding(check, missing is None or None, missing or f"{', '.join(names)} installed")


def _space(home: Path) -> Finding:
    path = home
    while not path.exists():
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Finding("disk space", False, f"{path} cannot be looked at: {error.strerror}")
    text = f"{size_text(usage.free)} of {size_text(usage.total)} free at {home}"
    good = usage.free >= FREE_FRACTION_MIN * usage.total
    return Finding("disk space", good, text if good else f"{text}; writes pause when it is full")


def _io_uring() -> Finding:
    """Asked of the kernel by making a ring: containers forbid it in several ways."""
    parameters = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_IO_URING_SETUP, 1, parameters)
    if descriptor >= 0:
        os.close(descriptor)
        return Finding("io_uring", True, "works")
    reason = os.strerror(ctypes.get_errno())
    return Finding("io_uring", None, f"{reason}; only ublk needs it (kernel.io_uring_disabled)")


def _memory_lock() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or os.geteuid() == 0:
        return Finding("memory lock limit", True, "none" if os.geteuid() else "none for root")
    text = f"{size_text(limit)}; raise it (LimitMEMLOCK=infinity) where memory is short"
    return Finding("memory lock limit", None, text)
