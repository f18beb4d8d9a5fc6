"""The API's listeners: each a web server in a thread of its own.

The one on the unix socket and the one on TCP serve separate applications, so that the one without
a token can never be reached over the network.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import uvicorn
from litestar import Litestar

from protocol.errors import BlockdError, ConflictError, RequestError

START_SECONDS = 60.0  # on a machine that is busy starting other services
DRAIN_SECONDS = 3  # requests that wait for a state are cut off after that
BACKLOG = 128
POLL_SECONDS = 0.02


class Listener:
    """One web server on one socket."""

    def __init__(self, app: Litestar, listening: socket.socket, address: str) -> None:
        self.address = address
        self._socket = listening
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                loop="asyncio",
                http="h11",
                ws="none",
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._thread = threading.Thread(target=self._run, name=f"api-{address}", daemon=True)

    def start(self) -> None:
        """Serve; returns when requests are answered."""
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise BlockdError(f"the API on {self.address} did not start; see the log")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(DRAIN_SECONDS + 2)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


def unix_socket(path: Path) -> socket.socket:
    """A listening unix socket only this user can connect to, whatever the length of its path."""
    path.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # the socket must never be open to others, not even for a moment
    try:
        # Through the open directory the address is short.
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.umask(before)
        os.close(directory)
    listening.listen(BACKLOG)
    return listening


def tcp_socket(address: str) -> socket.socket:
    """A listening TCP socket at HOST:PORT."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise RequestError(f"address {address!r} is not HOST:PORT; example: 127.0.0.1:9500")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConflictError(
            f"cannot listen at {address}: {error.strerror}; choose another --listen"
        ) from None
