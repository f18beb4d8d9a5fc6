"""What every daemon process does once: arguments, signals, pid file, the way it ends.

A daemon prints one `ready ...` line when it serves, tells a service manager that waits for it, logs
to standard error, and ends with the exit code of the error family after one line `blockd: ...`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from blockd.loop import READ, Loop
from blockd.notify import Notifier
from protocol.errors import BlockdError, RequestError, StorageError

KEY_BYTES_MAX = 4096  # a key file larger than this is some other file


def timestamp() -> str:
    """Now, UTC, ISO 8601 with seconds."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")  # noqa: UP017 - 3.11 has both


def log(message: str) -> None:
    """One line on standard error."""
    with contextlib.suppress(OSError):  # a log on a full disk is no reason to end
        print(f"{timestamp()} {message}", file=sys.stderr, flush=True)


def read_key(path: str | None) -> bytes:
    """The volume's key; without a file both sides use the empty key."""
    if path is None:
        return b""
    try:
        with open(path, "rb") as file:
            key = file.read(KEY_BYTES_MAX).strip()
    except OSError as error:
        raise RequestError(f"key file {path} cannot be read: {error.strerror}") from None
    if not key:
        raise RequestError(f"key file {path} is empty; put a random secret into it")
    return key


def rss_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def common_status(started: str, label: str) -> dict[str, Any]:
    """What every daemon reports of its process."""
    from blockd import __version__

    return {
        "pid": os.getpid(),
        "version": __version__,
        "program": sys.executable,
        "label": label,
        "started": started,
        "rss_bytes": rss_bytes(),
    }


def on_signals(loop: Loop, stop: Callable[[], None]) -> None:
    """SIGTERM and SIGINT call `stop` in the loop; broken pipes are handled where they happen.

    A signal that comes just before the loop begins to wait, or that a worker thread gets, would not
    end the wait: the socket does, to which the interpreter writes a byte for every signal.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def drain(events: int) -> None:
        assert wake.fileno() >= 0  # kept open as long as the loop knows this
        with contextlib.suppress(BlockingIOError):
            woken.recv(4096)

    loop.register(woken.fileno(), READ, drain)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: loop.post(stop))


def write_pid_file(path: str | None) -> None:
    """Leave our pid where the caller asked for it."""
    if path is not None:
        try:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
        except OSError as error:
            raise StorageError(f"cannot write the process id to {path}: {error.strerror}") from None


def ready(text: str) -> None:
    """Say that the daemon serves, to whoever started it: by hand, a node service or systemd."""
    print(f"ready {text}", flush=True)
    Notifier().tell("READY=1", f"STATUS={text}")


def run(work: Callable[[], int]) -> int:
    """Call `work`; an error of the families becomes one line and its exit code."""
    try:
        return work()
    except BlockdError as error:
        print(f"blockd: {error}", file=sys.stderr, flush=True)
        return error.exit_code
