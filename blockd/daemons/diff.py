"""What changed between two snapshots, or since one, as a list of extents for the control socket."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from blockd.daemons.control import Answer
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES
from replication.pieces import NoData

if TYPE_CHECKING:
    from replication.engine import Engine

EXTENTS_MAX = 10_000  # of one answer, 300 KB of JSON; the caller asks for the rest


class Diff(NoData):
    """One answer: changed extents of layer `layer_id` next to `base_id`, from `offset` on."""

    def __init__(
        self,
        engine: Engine,
        base_id: int,
        layer_id: int,
        offset: int,
        answer: Answer,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._engine = engine
        self._base_id = base_id
        self._layer_id = layer_id
        self._offset = offset
        self._answer = answer
        self._post = post
        self._extents: list[list[int]] = []

    def go_on(self) -> None:
        """Ask for the next part."""
        left = self._engine.record.size_bytes - self._offset
        if left <= 0 or len(self._extents) >= EXTENTS_MAX:
            following = self._offset if left > 0 else None
            self._answer({"extents": self._extents, "next": following})
            return
        self._engine.extents(self, None, self._offset, left, self._layer_id, self._base_id)

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        """A part of the answer."""
        for blocks, changed in runs:
            length = blocks * BLOCK_BYTES
            if changed and self._extents and sum(self._extents[-1]) == self._offset:
                self._extents[-1][1] += length
            elif changed:
                self._extents.append([self._offset, length])
            self._offset += length
        self._post(self.go_on)

    def done(self, cookie: Any, error: int) -> None:
        """No member could say it."""
        self._answer(StorageError(f"no replica in sync could compare: {os.strerror(error)}"))
