"""Telling the service manager how we are, after sd_notify(3): a datagram of VARIABLE=VALUE lines to
the unix socket $NOTIFY_SOCKET. Without that variable nobody asked, and nothing is sent.

The variables are taken out of the environment: a program we start must not speak for us. A manager
that does not listen is no reason to stop serving, so no error comes from here.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

SEND_SECONDS = 1.0  # a manager that hangs must not hold us up


class Notifier:
    """The way to the service manager; `watchdog_seconds` is how long it waits for WATCHDOG=1."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        usec = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        self.watchdog_seconds: float | None = None
        if usec.isdigit() and pid in ("", str(os.getpid())):
            self.watchdog_seconds = int(usec) / 1e6

    def tell(self, *lines: str) -> None:
        """Send these lines: READY=1, STOPPING=1, WATCHDOG=1, STATUS=what people should read."""
        if not self._address.startswith(("/", "@")):
            return
        address = self._address.encode(errors="surrogateescape")
        if address.startswith(b"@"):  # an address that is no file
            address = b"\0" + address[1:]
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link,
        ):
            link.settimeout(SEND_SECONDS)
            link.connect(address)
            link.send("\n".join(lines).encode())
