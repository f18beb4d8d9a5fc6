"""Repeating the last changes of a dead owner before anybody is served.

Some members applied changes that others never got. None of them was answered, so either outcome is
right, but all members must agree, and a read must not see what a later read does not. The source is
read, and what it holds is written to all members like any other write, at the same place of the
order. Readers are the source, and those that were equal to it, until that is done.

A member that is behind and has no space for it is given up and made equal later: a full disk can
only be emptied through a volume that is served.

If this process dies in between, the next owner finds the members as different as before, or less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from protocol.errors import BlockdError, StorageError
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from replication.answers import Chunks, blocks_of

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

PIECE_BLOCKS = PIECE_BYTES_MAX // BLOCK_BYTES
WINDOW = 32  # pieces under way

Done = Callable[[BlockdError | None], None]


class CatchUp:
    """Makes the members that are behind equal; also the client of its reads and writes."""

    def __init__(
        self, engine: Engine, ranges: Iterable[tuple[int, int]], behind: list[Link], done: Done
    ) -> None:
        self._engine = engine
        self._behind = behind
        self._done = done
        self._under_way = 0
        self._error = 0
        self._left = deque(_pieces(ranges))

    def start(self) -> None:
        """Repeat; `done` when all members have it."""
        engine = self._engine
        for link in self._behind:
            link.behind = True
        engine.set_readers([link for link in engine.readers if link not in self._behind])
        self._pump()

    def _pump(self) -> None:
        while self._left and self._under_way < WINDOW and not self._error:
            first, count = self._left.popleft()
            self._under_way += 1
            self._engine.read_blocks(self, [(first, count)], [first], [count], 0)
        if not self._under_way and (self._error or not self._left):
            self._end()

    def _end(self) -> None:
        engine = self._engine
        for link in self._behind:
            link.behind = False
        if self._error:
            self._done(StorageError("the last changes could not be repeated on all replicas"))
            return
        back = [link for link in self._behind if link.connected and link in engine.targets]
        engine.set_readers([*engine.readers, *back])
        self._done(None)

    # ---- a client of the engine -------------------------------------------------------------

    def data(self, cookie: tuple[int, int], chunks: Chunks) -> None:
        """What the source holds is written to everybody; zeros as zeros."""
        offset = cookie[0] * BLOCK_BYTES
        self._under_way += len(chunks) - 1
        for count, data in chunks:
            if data is None:
                self._engine.zero(self, None, offset, count, False, False)
            else:
                self._engine.write(self, None, offset, memoryview(bytes(data)), False)
            offset += count

    def blocks(self, cookies: Sequence[Any], cells: memoryview) -> None:
        for cookie, block in zip(cookies, blocks_of(cells), strict=True):
            self.data(cookie, [(BLOCK_BYTES, block)])

    def done(self, cookie: Any, error: int) -> None:
        self._error = self._error or error
        self._under_way -= 1
        self._pump()

    def extents(self, cookie: Any, runs: Sequence[tuple[int, bool]]) -> None:
        raise AssertionError("nothing is asked about extents")


def _pieces(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges merged where they touch, and cut into pieces."""
    merged: list[tuple[int, int]] = []
    for first, count in sorted(ranges):
        end = first + count
        if merged and first <= sum(merged[-1]):
            merged[-1] = (merged[-1][0], max(sum(merged[-1]), end) - merged[-1][0])
        else:
            merged.append((first, count))
    return [
        (start, min(PIECE_BLOCKS, first + count - start))
        for first, count in merged
        for start in range(first, first + count, PIECE_BLOCKS)
    ]
