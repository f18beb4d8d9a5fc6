"""One stream socket of a daemon: readiness to batches in, an outbox out.

The three kinds of connection (NBD client, replica session, member) differ in what a batch means,
not in how a socket is served. A subclass says what to do with received bytes (`received`) and with
the end of the stream (`lost`).

Invariants: `flush` keeps order and never blocks; while something is unsent the socket waits for
EPOLLOUT, and only a stream with `READS_WHILE_BLOCKED` is read meanwhile; a held stream is not read;
after `detach` nothing is called any more.
"""

from __future__ import annotations

import socket

from blockd.loop import HANGUP, READ, WRITE, Loop
from protocol.streams import Inbox, Outbox


class Stream:
    """A non-blocking connected socket in the loop."""

    READS_WHILE_BLOCKED = False

    def __init__(self, loop: Loop, sock: socket.socket, inbox: Inbox, outbox: Outbox) -> None:
        self.loop = loop
        self.inbox = inbox
        self.outbox = outbox
        self.socket: socket.socket | None = sock
        self.blocked = False
        self.ending = False
        self._wanted = READ
        loop.register(sock.fileno(), READ, self._ready)

    def received(self) -> None:
        """The inbox has new bytes."""
        raise NotImplementedError

    def lost(self, reason: str) -> None:
        """The peer is gone or broken; the subclass must `detach`."""
        raise NotImplementedError

    def drained(self) -> None:
        """Everything unsent was sent after a while in which it was not."""

    def _ready(self, events: int) -> None:
        if self.blocked:
            if events & HANGUP and not self.READS_WHILE_BLOCKED:
                self.lost("the peer went away")
                return
            if events & WRITE:
                self.flush()
            if self.blocked and not self.READS_WHILE_BLOCKED:
                return
        sock = self.socket
        if sock is None or not events & (READ | HANGUP):
            return
        inbox = self.inbox
        try:
            count = sock.recv_into(inbox.buffer[inbox.end :])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.lost(f"connection lost: {error.strerror}")
            return
        if count:
            inbox.end += count
            self.received()
        else:
            self.lost("the peer closed the connection")

    def flush(self) -> bool:
        """Send what the kernel takes; True if nothing is left (or nobody is there to get it)."""
        sock = self.socket
        if sock is None:
            return True
        try:
            sent = self.outbox.flush(sock.sendmsg)
        except OSError as error:
            self.lost(f"connection lost: {error.strerror}")
            return True
        if sent == self.blocked:
            self.blocked = not sent
            waiting = self._wanted | WRITE if self.READS_WHILE_BLOCKED else WRITE
            self.loop.modify(sock.fileno(), self._wanted if sent else waiting)
            if sent:
                self.loop.post(self.drained)  # whoever it was that sent the last of it
        if sent and self.ending:
            self.ended()
        return sent

    def ended(self) -> None:
        """Everything was sent, and `ending` is set: the subclass may close."""

    def hold(self) -> None:
        """Do not read from the peer until `release`."""
        self._want(0)

    def release(self) -> None:
        """Read from the peer again."""
        self._want(READ)

    def _want(self, events: int) -> None:
        if self.socket is not None and self._wanted != events:
            self._wanted = events
            if not self.blocked:
                self.loop.modify(self.socket.fileno(), events)

    def detach(self) -> bool:
        """Leave the loop and close the socket; False if that was done before."""
        if self.socket is None:
            return False
        self.loop.unregister(self.socket.fileno())
        self.socket.close()
        self.socket = None
        return True
