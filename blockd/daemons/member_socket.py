"""The socket of one member: fills its link's answers into the engine, sends its outbox."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from blockd.daemons.stream import Stream
from protocol import replica as wire
from protocol.errors import PeerError
from protocol.streams import Inbox

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon
    from replication.link import Link

INBOX_BYTES = 2 << 20  # a batch of answers with data


class MemberSocket(Stream):
    """A fenced session of the volume daemon with one replica."""

    READS_WHILE_BLOCKED = True  # answers free the room that requests wait for

    def __init__(self, daemon: VolumeDaemon, link: Link, sock: socket.socket) -> None:
        self.link = link
        self._daemon = daemon
        super().__init__(daemon.loop, sock, Inbox(INBOX_BYTES), link.outbox)

    def received(self) -> None:
        inbox = self.inbox
        frames: list[wire.Frame] = []
        try:
            start = wire.parse(inbox.buffer, inbox.buffer, inbox.start, inbox.end, frames)
            self._daemon.engine.received(self.link, frames)
        except PeerError as error:
            self.lost(str(error))
            return
        inbox.take(start, pinned=not self._daemon.send_everything())
        if inbox.end > inbox.start:
            inbox.reserve(wire.needed(inbox.buffer, inbox.start, inbox.end))

    @property
    def is_open(self) -> bool:
        """False once `close` was called."""
        return self.socket is not None

    def drained(self) -> None:
        self._daemon.member_drained()

    def lost(self, reason: str) -> None:
        self._daemon.engine.fail(self.link, reason)
        self._daemon.send_everything()

    def close(self) -> None:
        """Close the socket; the engine knows already."""
        if self.detach():
            self.link.queue.clear()
