"""A damaged block that no source can read, and that the member being made equal still has.

The last member in sync may have a damaged block when another one comes back. What that one holds
is not trusted by itself; but it proves to be the same block if its checksum is the one in the
source's map (the data was hit), or its data is the source's data (the map was hit). Then the source
is mended from it, which is as good as any read: those are believed for their checksum, too.

The caller holds the blocks of the live volume. If this process dies, nothing has changed, or a
block was mended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from protocol import replica as wire
from protocol.checksum import ZEROS, block_checksum
from protocol.errors import BlockdError, PeerError
from protocol.units import BLOCK_BYTES
from replication.repair import mend

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

Blocks = dict[int, tuple[int, memoryview]]
"""number in the job to map entry and data, of those that have data"""


class Rescue:
    """One attempt for some blocks of one logical layer; `done(error)`, None: all are mended."""

    def __init__(
        self,
        engine: Engine,
        source: Link,
        member: Link,
        place: tuple[int, int, int, int],
        is_head: bool,
        done: Callable[[BlockdError | None], None],
    ) -> None:
        self._engine = engine
        self._source = source
        self._layer_id, self._parent_id, self._first, self._count = place
        self._view_id = 0 if is_head else self._layer_id
        self._done = done
        self._found: dict[Link, Blocks] = {}
        self._failed = False
        for link in (source, member):
            engine.call(
                link,
                wire.LAYER_READ,
                partial(self._read, link, member),
                flags=self._count,
                offset=wire.place(self._parent_id, self._first),
                argument=self._layer_id,
            )

    def _read(
        self,
        link: Link,
        member: Link,
        argument: int,
        payload: memoryview | None,
        error: BlockdError | None,
    ) -> None:
        if self._failed:
            return
        if error is not None or payload is None:
            self._failed = True
            self._done(error or PeerError("an answer without blocks"))
            return
        self._found[link] = blocks_of(payload, self._count)
        if len(self._found) == 2:
            self._compare(self._found[self._source], self._found[member])

    def _compare(self, theirs: Blocks, ours: Blocks) -> None:
        bad = [n for n, (entry, data) in theirs.items() if block_checksum(data) != entry]
        proven = [n for n in bad if n in ours and is_the_same(*theirs[n], *ours[n])]
        if not bad or proven != bad:
            self._done(PeerError("a block is damaged there, and no other replica has it"))
        else:
            self._mend([(number, ours[number][1]) for number in bad])

    def _mend(self, left: list[tuple[int, memoryview]]) -> None:
        number, data = left.pop()

        def mended(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
            if error is not None or not left:
                self._done(error)
            else:
                self._mend(left)

        where = self._view_id, self._first + number, 1
        mend(self._engine, self._source, where, [(BLOCK_BYTES, data)], mended)


def blocks_of(payload: memoryview, count: int) -> Blocks:
    """The content of a LAYER_DATA, copied; LookupError or ValueError if it makes no sense."""
    entries, at, found = payload[: 4 * count].cast("I"), 4 * count, {}
    for number in range(count):
        if entries[number] > ZEROS:
            data = memoryview(bytes(payload[at : at + BLOCK_BYTES]))
            if len(data) != BLOCK_BYTES:
                raise ValueError("blocks without their data")
            found[number] = (entries[number], data)
            at += BLOCK_BYTES
    return found


def is_the_same(entry: int, data: memoryview, other_entry: int, other_data: memoryview) -> bool:
    """Is a sound block what a damaged one was? Its map entry or its data must be the same."""
    if block_checksum(other_data) != other_entry:
        return False
    return other_entry == entry or other_data == data
