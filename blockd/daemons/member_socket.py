"""The socket of one member: fills its link's answers into the engine, sends its outbox."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from blockd.loop import HANGUP, READ, WRITE
from protocol import replica as wire
from protocol.errors import PeerError
from protocol.streams import Inbox

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon
    from replication.link import Link

INBOX_BYTES = 2 << 20  # a batch of answers with data


class MemberSocket:
    """A fenced session of the volume daemon with one replica."""

    def __init__(self, daemon: VolumeDaemon, link: Link, sock: socket.socket) -> None:
        self.link = link
        self._daemon = daemon
        self._socket: socket.socket | None = sock
        self._inbox = Inbox(INBOX_BYTES)
        self._blocked = False
        daemon.loop.register(sock.fileno(), READ, self._ready)

    def _ready(self, events: int) -> None:
        sock = self._socket
        if sock is None:
            return
        if events & WRITE:
            self.flush()
            self._daemon.member_drained()
        if self._socket is None or not events & (READ | HANGUP):
            return
        try:
            count = self._inbox.receive(sock.recv_into)
        except OSError as error:
            self._lost(f"connection lost: {error.strerror}")
            return
        if count == 0:
            self._lost("the replica closed the connection")
        elif count > 0:
            self._received()

    def _received(self) -> None:
        inbox = self._inbox
        frames: list[wire.Frame] = []
        try:
            start = wire.parse(inbox.buffer, inbox.buffer, inbox.start, inbox.end, frames)
            self._daemon.engine.received(self.link, frames)
        except PeerError as error:
            self._lost(str(error))
            return
        inbox.take(start, pinned=not self._daemon.send_everything())
        if inbox.end > inbox.start:
            inbox.reserve(wire.needed(inbox.buffer, inbox.start, inbox.end))

    def flush(self) -> bool:
        """Send the link's outbox; True if all of it left."""
        sock = self._socket
        if sock is None:
            return True
        try:
            sent = self.link.outbox.flush(sock.sendmsg)
        except OSError as error:
            self._lost(f"connection lost: {error.strerror}")
            return True
        if sent == self._blocked:
            self._blocked = not sent
            self._daemon.loop.modify(sock.fileno(), READ if sent else READ | WRITE)
        return sent

    def _lost(self, reason: str) -> None:
        self._daemon.engine.fail(self.link, reason)
        self._daemon.send_everything()

    def close(self) -> None:
        """Close the socket; the engine knows already."""
        if self._socket is not None:
            self._daemon.loop.unregister(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self.link.queue.clear()
