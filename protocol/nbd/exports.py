"""What a server offers to clients: an export, and where exports come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.nbd import constants as c
from protocol.units import BLOCK_BYTES


@dataclass(frozen=True)
class Export:
    """One name a client can choose, and what it may expect behind it.

    `contexts` are the metadata contexts a client can select on it, full names in the order they
    are listed.
    """

    name: str
    size_bytes: int
    read_only: bool = False
    minimum_block: int = 1
    preferred_block: int = BLOCK_BYTES
    maximum_payload: int = c.MAXIMUM_PAYLOAD_BYTES
    description: str = ""
    rotational: bool = False
    multi_conn: bool = True
    contexts: tuple[str, ...] = (c.BASE_ALLOCATION,)

    def __post_init__(self) -> None:
        minimum, preferred, maximum = (
            self.minimum_block,
            self.preferred_block,
            self.maximum_payload,
        )
        assert minimum.bit_count() == 1
        assert minimum <= 1 << 16
        assert preferred.bit_count() == 1
        assert preferred >= max(minimum, 512)
        assert maximum % minimum == 0
        assert preferred <= maximum <= c.DRAIN_BYTES_MAX
        assert 0 <= self.size_bytes < 1 << 63
        assert len(self.name.encode()) <= c.STRING_BYTES_MAX
        assert len(self.description.encode()) <= c.STRING_BYTES_MAX
        assert all(":" in context for context in self.contexts)

    @property
    def transmission_flags(self) -> int:
        """All flags but SEND_DF, which depends on the connection: it needs structured replies."""
        flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_CACHE
        if self.read_only:
            flags |= c.FLAG_READ_ONLY
        else:
            flags |= c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO
        if self.rotational:
            flags |= c.FLAG_ROTATIONAL
        if self.multi_conn:
            flags |= c.FLAG_CAN_MULTI_CONN
        return flags


class ExportSource(Protocol):
    """Where a handshake looks exports up.

    Both calls must be cheap: LIST finds every export. What an export needs (an open snapshot) is
    prepared when a connection enters the transmission phase.
    """

    def list(self) -> Sequence[str]:
        """The names of all exports."""
        ...

    def find(self, name: str) -> Export | None:
        """The export of that name; the empty name asks for the default export."""
        ...
