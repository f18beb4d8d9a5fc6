"""What a front end is: the way a consumer reaches an attached volume.

The state of a front end is looked up in the kernel and in files next to the volume, never only in
the memory of the node service, which may be killed at any moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote


@dataclass(frozen=True)
class Target:
    """What a front end serves, a volume or (read-only) VOLUME@SNAPSHOT: under which name, where its
    daemon listens, and a directory for own files.

    `identity` is unique and kept for life: the volume's UUID, for a snapshot with @NAME behind it.
    `daemon` identifies the running volume daemon (its epoch); a device that was made for an
    earlier one has lost its connection. `device_socket` is for the kernel's device only, and
    `device_connections` is how many connections for this export the daemon has there, and devices
    of it that it serves itself. `control` is the control socket of the daemon.
    `size_bytes` is what the daemon serves, 0 if a device cannot get another size now; `server` is
    its pid. These have no value if the daemon was not asked, which is enough to find, and to take
    down, what is there.
    """

    export: str
    identity: str
    directory: Path
    nbd_socket: Path
    control: Path
    device_socket: Path
    block_size: int
    daemon: str
    read_only: bool = False
    size_bytes: int = 0
    device_connections: int = 0
    server: int | None = None

    @property
    def what(self) -> str:
        """It, in a message."""
        return f"{'snapshot' if self.read_only else 'volume'} {self.export}"

    @property
    def nbd_uri(self) -> str:
        """Its NBD URI."""
        return f"nbd+unix:///{quote(self.export, safe='')}?socket={quote(str(self.nbd_socket))}"


@dataclass(frozen=True)
class Attachment:
    """A front end that is up. `stale`: its connection to the volume daemon is gone for good."""

    device: str | None
    stale: bool = False


class FrontEnd(Protocol):
    """One way to attach a volume. Every method is idempotent.

    `reconnects`: its devices outlive the volume daemon. I/O waits until `attach` has given the
    device to the next one; `find` does not call it stale, and `cut_off` ends it.
    """

    name: str
    reconnects: bool

    def unavailable(self) -> str | None:
        """Why it cannot be used here, None if it can."""

    def find(self, target: Target) -> Attachment | None:
        """What is up for this volume, None if nothing is."""

    def attach(self, target: Target) -> Attachment:
        """Bring it up, or what is lacking; the volume daemon serves already."""

    def detach(self, target: Target) -> None:
        """Take it down; ConflictError while it is in use."""

    def cut_off(self, target: Target) -> None:
        """Take down for good what reconnects, although it is in use: its users get I/O errors."""
