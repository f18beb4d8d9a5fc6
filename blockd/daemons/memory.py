"""Keeps a daemon out of the reach of the memory it may be asked to free.

When the kernel is short of memory it writes dirty pages to their devices and waits. If such a
device is served by this process, and this process waits for memory, nobody goes on. So a daemon on
the path of a kernel device

- is an IO flusher: its allocations never wait for I/O (prctl(2), PR_SET_IO_FLUSHER);
- keeps in memory what it has touched: heap and code are never read back from a disk (mlockall(2)
  with MCL_ONFAULT; maps of its data files are exempt, snapshots/syscalls.py);
- is not chosen by the OOM killer (proc_pid_oom_score_adj(5)).

Threads inherit the first, so this is called before there are any.
"""

from __future__ import annotations

import ctypes
import os
import resource

_PR_SET_IO_FLUSHER = 57  # include/uapi/linux/prctl.h
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # include/uapi/asm-generic/mman.h
_CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
_NEVER = "-1000"

_libc = ctypes.CDLL(None, use_errno=True)


def protect() -> list[str]:
    """Do what this process is allowed to; what could not be done, and why."""
    undone = []
    if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        undone.append(f"PR_SET_IO_FLUSHER: {os.strerror(ctypes.get_errno())}")
    # With a limit, locking succeeds now and makes a later, larger allocation fail.
    if not _may_lock():
        undone.append("mlockall: neither CAP_IPC_LOCK nor an unlimited RLIMIT_MEMLOCK")
    elif _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        undone.append(f"mlockall: {os.strerror(ctypes.get_errno())}")
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(_NEVER)
    except OSError as error:
        undone.append(f"oom_score_adj: {error.strerror}")
    return undone


def _may_lock() -> bool:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    with open("/proc/self/status") as status:
        words = next(line.split() for line in status if line.startswith("CapEff:"))
    return bool(int(words[1], 16) >> _CAP_IPC_LOCK & 1)
