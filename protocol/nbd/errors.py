"""The one error a client of this server can cause here."""

from __future__ import annotations

from protocol.errors import PeerError


class ProtocolViolation(PeerError):
    """The client sent bytes that the NBD protocol forbids; its connection ends, nothing else."""

    code = "nbd_violation"
    retry = False
