"""The `socket` front end: the NBD socket of the volume daemon itself. Needs no privilege.

Nothing has to be made or taken down: the volume daemon listens while it runs. Whether clients are
connected at a detach is asked of the daemon by the reconciler.
"""

from __future__ import annotations

from blockd.frontends.base import Attachment, Target


class SocketFrontEnd:
    """An NBD address and no device."""

    name = "socket"
    reconnects = False

    def unavailable(self) -> str | None:
        return None

    def find(self, target: Target) -> Attachment | None:
        return Attachment(device=None) if target.nbd_socket.exists() else None

    def attach(self, target: Target) -> Attachment:
        return Attachment(device=None)

    def detach(self, target: Target) -> None:
        return None

    def cut_off(self, target: Target) -> None:
        raise AssertionError("a socket does not outlive its volume daemon")
