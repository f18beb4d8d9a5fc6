"""The control socket of a daemon: one JSON object per line in, one per line out, in order.

`{"command": "status"}` is answered `{"ok": true, ...}`; a failure is
`{"ok": false, "code": ..., "message": ...}` with the code of an error family. A command may answer
later; the next line of the same connection waits for it. The socket file is private to its owner
(mode 0600): who can open it controls the volume.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from blockd.daemons import addresses
from blockd.loop import READ, WRITE, Loop
from protocol.errors import BlockdError, RequestError

LINE_BYTES_MAX = 1 << 20  # a request is small; labels are the largest part
CONNECTIONS_MAX = 32  # a node service, a few command lines

Answer = Callable[[dict[str, Any] | BlockdError], None]
Command = Callable[[dict[str, Any], Answer], None]


class ControlServer:
    """Accepts control connections and runs `commands`."""

    def __init__(
        self,
        loop: Loop,
        address: str,
        commands: Mapping[str, Command],
        sock: socket.socket | None = None,
    ) -> None:
        """Listen at `address`, or go on with `sock`, which does already."""
        self._loop = loop
        self._commands = commands
        self._connections: set[_Connection] = set()
        self.asked = address
        self.socket, self.address = (sock, address) if sock else self._listen(address)
        loop.register(self.socket.fileno(), READ, self._accept)

    @staticmethod
    def _listen(address: str) -> tuple[socket.socket, str]:
        if not address.startswith("unix:"):
            raise RequestError(
                f"control address {address!r} is not unix:PATH; it must be private to its owner"
            )
        mask = os.umask(0o177)
        try:
            return addresses.listen(address)
        finally:
            os.umask(mask)

    def _accept(self, events: int) -> None:
        try:
            sock, _ = self.socket.accept()
        except OSError:
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        self._connections.add(_Connection(self._loop, sock, self._run, self._connections.discard))

    def _run(self, line: bytes, answer: Answer) -> None:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise RequestError("a control request must be a JSON object")
            command = self._commands.get(str(request.get("command")))
            if command is None:
                raise RequestError(
                    f"unknown command {request.get('command')!r}; known: "
                    + ", ".join(sorted(self._commands))
                )
            command(request, answer)
        except BlockdError as error:
            answer(error)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            answer(RequestError(f"control request not understood: {error!r}"))

    def close(self) -> None:
        """Close the listener and every connection; the socket file goes away."""
        self._loop.unregister(self.socket.fileno())
        for connection in list(self._connections):
            connection.close()
        addresses.close(self.socket)


class _Connection:
    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        run: Callable[[bytes, Answer], None],
        closed: Callable[[_Connection], None],
    ) -> None:
        self._loop = loop
        self._sock: socket.socket | None = sock
        self._run = run
        self._closed = closed
        self._input = bytearray()
        self._output = bytearray()
        self._busy = False
        loop.register(sock.fileno(), READ, self._ready)

    def _ready(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        if events & WRITE:
            self._send()
        if self._sock is None or not events & ~WRITE:
            return
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._input += data
        if not data or len(self._input) > LINE_BYTES_MAX:
            self.close()
            return
        self._next()

    def _next(self) -> None:
        while not self._busy and self._sock is not None:
            line, newline, rest = self._input.partition(b"\n")
            if not newline:
                return
            self._input = rest
            self._busy = True
            self._run(bytes(line), self._answer)

    def _answer(self, result: dict[str, Any] | BlockdError) -> None:
        if isinstance(result, BlockdError):
            content: dict[str, Any] = {"ok": False, "code": result.code, "message": str(result)}
        else:
            content = {"ok": True, **result}
        self._busy = False
        self._output += json.dumps(content).encode() + b"\n"
        self._send()
        self._loop.post(self._next)

    def _send(self) -> None:
        if self._sock is None:
            return
        try:
            while self._output:
                del self._output[: self._sock.send(self._output)]
        except BlockingIOError:
            self._loop.modify(self._sock.fileno(), READ | WRITE)
            return
        except OSError:
            self.close()
            return
        self._loop.modify(self._sock.fileno(), READ)

    def close(self) -> None:
        if self._sock is not None:
            self._loop.unregister(self._sock.fileno())
            self._sock.close()
            self._sock = None
            self._closed(self)
