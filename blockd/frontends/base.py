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

    `daemon` identifies the running volume daemon (its epoch); a device that was made for an
    earlier one has lost its connection.
    """

    export: str
    directory: Path
    nbd_socket: Path
    block_size: int
    daemon: str
    read_only: bool = False

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
    """One way to attach a volume. Every method is idempotent."""

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot be used here, None if it can."""

    def find(self, target: Target) -> Attachment | None:
        """What is up for this volume, None if nothing is."""

    def attach(self, target: Target) -> Attachment:
        """Bring it up; the volume daemon serves already."""

    def detach(self, target: Target) -> None:
        """Take it down; ConflictError while it is in use."""
