"""Says that the node service is alive, as long as it is: WATCHDOG=1 three times in the time the
service manager allows, and STATUS= when it has changed.

Alive means: the threads that reconcile, watch and supervise run; no pass, and no volume that is due
for one, has waited for longer than any pass may take; the API answers. If one of these fails,
nothing is sent, and the manager starts the service anew. The data path does not notice.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from blockd.node.context import log
from blockd.notify import Notifier

PINGS = 3  # in the time allowed: one may come late, two may not
STATUS_SECONDS = 20.0  # how often the status is looked at where no watchdog waits
ANSWER_SECONDS = 5.0  # the API's own loop answers within milliseconds

Look = Callable[[], str | None]


class Watchdog:
    """One thread; `stuck` tells why the service is not alive, None if it is."""

    def __init__(self, notifier: Notifier, stuck: Look, status: Callable[[], str]) -> None:
        self._notifier, self._stuck, self._status = notifier, stuck, status
        self._said: str | None = None
        self._stop = threading.Event()
        self._seconds = (notifier.watchdog_seconds or STATUS_SECONDS * PINGS) / PINGS
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Say that the service is ready, and go on saying that it is alive."""
        self._notifier.tell("READY=1")
        self._thread.start()

    def stop(self) -> None:
        """Say that the service stops; before its parts end, for that is not a failure then."""
        self._stop.set()
        self._notifier.tell("STOPPING=1", "STATUS=stopping; volumes go on serving")
        self._thread.join(2 * ANSWER_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            reason = self._stuck()
            status = f"not alive: {reason}" if reason else self._status()
            if self._stop.is_set():
                return
            if status != self._said:
                self._said = status
                self._notifier.tell(f"STATUS={status}")
                if reason:
                    log.error("%s", status)
            if not reason and self._notifier.watchdog_seconds is not None:
                self._notifier.tell("WATCHDOG=1")
            self._stop.wait(self._seconds)


def api_stuck(path: Path) -> str | None:
    """Why the API on this unix socket does not answer, None if it does."""
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(ANSWER_SECONDS)
                # Through the open directory the address is short.
                link.connect(f"/proc/self/fd/{directory}/{path.name}")
                link.sendall(b"GET /v1/version HTTP/1.1\r\nHost: blockd\r\n\r\n")
                answer = link.recv(64)
        finally:
            os.close(directory)
    except OSError as error:
        return f"the API at {path} does not answer: {error.strerror or error}"
    return None if answer.startswith(b"HTTP/1.1 200 ") else f"the API at {path} says {answer!r}"
