"""The client's half of the NBD handshake, so that the kernel can be given a connected socket.

The kernel's nbd driver knows the transmission phase only. Whoever sets a device up connects, asks
for the export by name (fixed newstyle, NBD_OPT_GO) and hands the socket over. The driver
understands simple replies, so structured ones are not asked for.

Blocking, bounded by HANDSHAKE_SECONDS. Every refusal of the server is a PeerError with its words.
Source: doc/proto.md of the NBD project, "Newstyle negotiation".
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import PeerError
from protocol.nbd import constants as c

HANDSHAKE_SECONDS = 10.0  # the server gives up as early; its loop answers within milliseconds
SOCKET_BUFFER_BYTES = 4 << 20  # what the volume daemon gives its own end: a few batches of writes
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # beyond the system's maximum; the caller is root
_REPLY_BYTES_MAX = c.STRING_BYTES_MAX + 64  # the longest information item is a description

_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")


@dataclass
class Connection:
    """A socket in the transmission phase, and what the server said of the export behind it."""

    socket: socket.socket
    size_bytes: int
    flags: int


def connect(path: Path, export: str) -> Connection:
    """Connect to the unix socket at `path` and choose an export."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(HANDSHAKE_SECONDS)
        _enlarge_buffers(link)
        link.connect(str(path))
        size_bytes, flags = _go(link, export)
        link.settimeout(None)  # the kernel waits as long as a request takes
    except OSError as error:
        link.close()
        reason = "no answer in time" if isinstance(error, TimeoutError) else error.strerror
        raise PeerError(
            f"the volume daemon at {path} cannot be reached: {reason or error}"
        ) from None
    except PeerError:
        link.close()
        raise
    return Connection(link, size_bytes, flags)


def _enlarge_buffers(link: socket.socket) -> None:
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with contextlib.suppress(OSError):  # not root: the system's default does as well
            link.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def _go(link: socket.socket, export: str) -> tuple[int, int]:
    """Size and transmission flags of the export the connection now serves."""
    magic, option_magic, server_flags = _GREETING.unpack(_receive(link, _GREETING.size))
    if (magic, option_magic) != (c.INIT_MAGIC, c.OPTION_MAGIC):
        raise PeerError(f"what answers is no NBD server of the newstyle protocol: {magic:#x}")
    if not server_flags & c.FLAG_FIXED_NEWSTYLE:
        raise PeerError("the NBD server does not speak the fixed newstyle protocol")
    name = export.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    client_flags = server_flags & (c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
    link.sendall(struct.pack(">I", client_flags))
    link.sendall(_OPTION.pack(c.OPTION_MAGIC, c.OPT_GO, len(data)) + data)
    found: tuple[int, int] | None = None
    while True:
        magic, option, kind, length = _OPTION_REPLY.unpack(_receive(link, _OPTION_REPLY.size))
        if magic != c.OPTION_REPLY_MAGIC or option != c.OPT_GO or length > _REPLY_BYTES_MAX:
            raise PeerError(
                f"the NBD server answers GO with magic {magic:#x}, option {option}, {length} bytes"
            )
        payload = _receive(link, length)
        if kind & 1 << 31:
            words = payload.decode(errors="replace") or f"error {kind & ~(1 << 31)}"
            raise PeerError(f"the NBD server refuses export {export!r}: {words}")
        if kind == c.REP_INFO and length == 12 and payload[:2] == b"\0\0":  # INFO_EXPORT
            found = struct.unpack_from(">QH", payload, 2)
        if kind == c.REP_ACK:
            if found is None:
                raise PeerError(f"the NBD server does not say how long export {export!r} is")
            return found


def _receive(link: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        part = link.recv(count - len(received))
        if not part:
            raise PeerError("the NBD server closed the connection during the handshake")
        received += part
    return bytes(received)
