"""BLOCK_STATUS: the metadata contexts of an export, asked of the engine and put into one reply.

`base:allocation` says where there is data. `blockd:changed:NAME` says where the export may differ
from snapshot NAME of the volume: bit 0 of the status is set there. Each selected context is one
question to a member; the reply goes out when all are answered, context by context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.errors import NotFoundError
from protocol.nbd import constants as nbd
from protocol.nbd import replies, requests
from protocol.units import BLOCK_BYTES
from replication.pieces import NoData

if TYPE_CHECKING:
    from blockd.daemons.nbd_server import NbdConnection
    from replication.engine import Engine
    from replication.structure import Structure

CHANGED_CONTEXT = "blockd:changed:"
CHANGED = 1  # status flag


class BlockStatus(NoData):
    """One request; stands in for its connection as the engine's client."""

    def __init__(self, connection: NbdConnection, request: requests.Request) -> None:
        self._connection = connection
        self._request = request
        self._found: dict[int, list[tuple[int, int]]] = {}  # by context: (bytes, status)
        self._error = 0
        self._left = 0

    def ask(
        self,
        engine: Engine,
        structure: Structure,
        contexts: Sequence[tuple[int, str]],
        layer_id: int,
    ) -> None:
        """One question for each selected context."""
        _, _, _, offset, length, _ = self._request
        self._left = len(contexts)
        for context_id, name in contexts:
            cookie, base_id = (context_id, name), None
            if name.startswith(CHANGED_CONTEXT):
                try:
                    base_id = structure.find(name.removeprefix(CHANGED_CONTEXT)).id
                except NotFoundError:  # deleted since it was selected
                    self.done(cookie, nbd.EIO)
                    continue
            engine.extents(self, cookie, offset, length, layer_id, base_id)

    def done(self, cookie: tuple[int, str], error: int) -> None:
        """A question could not be answered."""
        self._error = self._error or error
        self._one_less()

    def extents(self, cookie: tuple[int, str], runs: Sequence[tuple[int, bool]]) -> None:
        """The answer to one question: (blocks, yes or no) from the block of the offset on."""
        _, flags, _, offset, length, _ = self._request
        context_id, name = cookie
        if name.startswith(CHANGED_CONTEXT):
            yes, no = CHANGED, 0
        else:
            yes, no = 0, nbd.STATE_HOLE | nbd.STATE_ZERO
        lead = offset & (BLOCK_BYTES - 1)
        found: list[tuple[int, int]] = []
        for blocks, state in runs[: nbd.EXTENTS_MAX]:
            count = min(blocks * BLOCK_BYTES - lead, length)
            lead = 0
            found.append((count, yes if state else no))
            length -= count
            if flags & nbd.CMD_FLAG_REQ_ONE or not length:
                break
        self._found[context_id] = found
        self._one_less()

    def _one_less(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._error:
            self._connection.done(self._request, self._error)
            return
        handle, last = self._request[2], len(self._found) - 1
        chunks = [
            replies.block_status_chunk(handle, context_id, extents, number == last)
            for number, (context_id, extents) in enumerate(self._found.items())
        ]
        self._connection.status(chunks)
