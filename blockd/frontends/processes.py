"""What /proc tells: mounts, who has a device open, and when a process has ended."""

from __future__ import annotations

import os
import re
import select
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

USERS_SHOWN_MAX = 5


@dataclass(frozen=True)
class MountEntry:
    """One line of /proc/self/mounts."""

    source: str
    path: str
    fs: str


def mounts() -> list[MountEntry]:
    """All mounts this process can see."""
    entries = []
    for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        source, path, fs = (_unescaped(word) for word in line.split(" ")[:3])
        entries.append(MountEntry(source, path, fs))
    return entries


def _unescaped(word: str) -> str:
    """Blanks and backslashes are octal escapes in that file."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def users_of(path: str, keeper: int | None = None) -> list[tuple[int, str]]:
    """Processes (pid, name) that have this file or something below it open; not `keeper`."""
    users, others = [], (os.getpid(), keeper)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) not in others and _uses(entry.path, path):
            try:
                name = Path(entry.path, "comm").read_text().strip()
            except OSError:
                continue
            users.append((int(entry.name), name))
    return users


def _uses(process: str, path: str) -> bool:
    links = [f"{process}/cwd", f"{process}/root"]
    try:
        links += [f"{process}/fd/{fd}" for fd in os.listdir(f"{process}/fd")]
    except OSError:
        return False
    for link in links:
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == path or target.startswith(path + "/"):
            return True
    return False


def users_text(path: str, keeper: int | None = None) -> str:
    """Who uses a file or mount, for a message; not `keeper`."""
    users = users_of(path, keeper)
    if not users:
        return "the kernel or a process that cannot be seen from here"
    shown = ", ".join(f"pid {pid} ({name})" for pid, name in users[:USERS_SHOWN_MAX])
    more = len(users) - USERS_SHOWN_MAX
    return shown + (f" and {more} more" if more > 0 else "")


def has_ended(pidfd: int, timeout_seconds: float = 0.0) -> bool:
    """True once the process has ended; its descriptor may have any number, unlike with select."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))


def wait_for_end(pid: int, timeout_seconds: float) -> bool:
    """True once the process has ended, even if nobody has collected its exit code."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return has_ended(pidfd, timeout_seconds)
    finally:
        os.close(pidfd)


def collect(child: subprocess.Popen[bytes]) -> None:
    """Collect the exit code whenever the child ends, so that it does not stay as a zombie."""
    threading.Thread(target=child.wait, name=f"collect-{child.pid}", daemon=True).start()
