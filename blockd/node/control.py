"""The client of the daemons' control sockets: one JSON object per line, there and back.

A daemon that refuses answers with the code of an error family, which is raised here. A daemon
that is away, or does not answer in time, is a PeerError.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from protocol.errors import PeerError, from_code

ANSWER_SECONDS = 30.0  # a snapshot or revert waits for the disks of all replicas
STATUS_SECONDS = 5.0  # a daemon's loop never blocks that long
LINE_BYTES_MAX = 4 << 20  # the status of 254 snapshots with their labels is far below

Answer = dict[str, Any]


def ask(
    path: Path, command: str, *, timeout_seconds: float = ANSWER_SECONDS, **arguments: Any
) -> Answer:
    """Send one command to the daemon whose control socket is at `path`; its answer."""
    request = json.dumps({"command": command, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_seconds)
            link.connect(str(path))
            link.sendall(request)
            line = _read_line(link)
    except TimeoutError:
        raise PeerError(
            f"the daemon at {path} did not answer {command} within {timeout_seconds:g} s"
        ) from None
    except OSError as error:
        raise PeerError(f"no daemon answers at {path}: {error.strerror or error}") from None
    return _checked(path, command, line)


def status(path: Path, timeout_seconds: float = STATUS_SECONDS) -> Answer:
    """The daemon's status."""
    return ask(path, "status", timeout_seconds=timeout_seconds)


def _read_line(link: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = link.recv(1 << 16)
        if not chunk or len(received) > LINE_BYTES_MAX:
            break
        received += chunk
    return bytes(received)


def _checked(path: Path, command: str, line: bytes) -> Answer:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or "ok" not in answer:
        raise PeerError(f"the daemon at {path} broke off its answer to {command}")
    if not answer["ok"]:
        message = str(answer.get("message", f"{command} failed"))
        raise from_code(str(answer.get("code", "")), message)
    return answer
