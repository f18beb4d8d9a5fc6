"""Repairing damaged blocks: read them elsewhere, then MEND them where they are bad.

A read whose data does not match its checksum, or that the disk refuses, is answered from another
member (reading.py) and named here. One repair at a time: blocks of the live volume are held by the
range lock while they are read from another member and until the MEND stands in the bad member's
queue, so it lies at one point of the order; snapshots do not change. The member compares by itself
and replaces what is damaged, so a repair that was not needed changes nothing.

If this process dies, the block is found again by the next read or scrub. If the member dies while
it writes the block, the block is as bad as before.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.checksum import ZEROS, block_checksums
from protocol.errors import BlockdError, StorageError
from protocol.units import BLOCK_BYTES
from replication.answers import Chunks
from replication.link import Reads, Reply
from replication.pieces import BlockReader

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link

WAITING_MAX = 1024  # repairs; what does not fit is found again by the next read of it

Done = Callable[[int, BlockdError | None], None]
"""how many blocks were bad and are good now; why the others could not be repaired"""


@dataclass(frozen=True)
class Damage:
    """Blocks that a member could not read well, in the live volume (layer 0) or a snapshot."""

    link: Link
    layer_id: int
    first: int
    count: int

    def __str__(self) -> str:
        where = f"layer {self.layer_id}" if self.layer_id else "the live volume"
        last = self.first + self.count - 1
        blocks = f"block {self.first}" if self.count == 1 else f"blocks {self.first} to {last}"
        return f"{blocks} of {where} on replica {self.link.replica_uuid}"


class Repairs:
    """The repairs of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: dict[Damage, list[Done]] = {}
        self._running: Damage | None = None
        self.repaired_blocks = 0
        self.failed = 0  # repairs that were not possible
        self.on_event: Callable[[str], None] = lambda message: None

    def damaged(
        self, link: Link, layer_id: int, first: int, count: int, done: Done | None = None
    ) -> None:
        """Repair some blocks, soon."""
        damage = Damage(link, layer_id, first, count)
        waiting = self._waiting
        if damage not in waiting and len(waiting) >= WAITING_MAX and done is None:
            return
        waiting.setdefault(damage, []).extend([done] if done is not None else [])
        if self._running is None:
            self._next()

    def _next(self) -> None:
        damage = self._running = next(iter(self._waiting), None)
        if damage is not None:
            _Repair(self._engine, damage, lambda mended, error: self._ended(damage, mended, error))

    def _ended(self, damage: Damage, mended: int, error: BlockdError | None) -> None:
        self.repaired_blocks += mended
        damage.link.repaired_blocks += mended
        if error is not None:
            self.failed += 1
            self.on_event(f"could not repair {damage}: {error}")
        elif mended:
            self.on_event(f"repaired {mended} damaged of {damage}")
        listeners = self._waiting.pop(damage)
        self._next()
        for done in listeners:
            done(mended, error)


class _Repair(BlockReader):
    """One repair; begins at once."""

    def __init__(self, engine: Engine, damage: Damage, ended: Done) -> None:
        self._engine = engine
        self._damage = damage
        self._ended = ended
        if damage.layer_id == 0:
            engine.locks.acquire(damage.first, damage.first + damage.count, self._read)
        else:
            self._read()

    def _read(self) -> None:
        damage = self._damage
        where = [damage.first], [damage.count], damage.layer_id
        self._engine.send_reads(Reads(self, [None], *where, tried=(damage.link,)))

    def data(self, cookie: Any, chunks: Chunks) -> None:
        """Another member has it."""
        damage = self._damage
        where = damage.layer_id, damage.first, damage.count
        mend(self._engine, damage.link, where, chunks, self._mended)
        self._release()

    def done(self, cookie: Any, error: int) -> None:
        """Nobody else has it."""
        self._release()
        reason = "no other replica in sync can read it"
        self._ended(0, StorageError(reason, errno=error or errno.EIO))

    def _mended(self, argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
        mended = 0
        if error is None:
            mended = int(wire.json_content(payload)["mended"])
        self._ended(mended, error)

    def _release(self) -> None:
        if self._damage.layer_id == 0:
            self._engine.locks.release(self._damage.first, self._damage.first + self._damage.count)


def mend(
    engine: Engine,
    link: Link,
    where: tuple[int, int, int],
    chunks: Sequence[tuple[int, memoryview | None]],
    reply: Reply,
) -> None:
    """Have a member replace what is damaged of some blocks of a view: (layer, first, count)."""
    layer_id, first, count = where
    payload = memoryview(content_of(chunks))
    engine.call(
        link,
        wire.MEND,
        reply,
        flags=count,
        length=wire.map_checksum(payload, count),
        offset=wire.place(0, first),
        argument=layer_id,
        payload=[payload],
    )


def content_of(chunks: Sequence[tuple[int, memoryview | None]]) -> bytes:
    """Whole blocks as the payload of a MEND: their map entries, then their data."""
    entries = array("I")
    data = []
    for size, part in chunks:
        if part is None:
            entries.extend([ZEROS] * (size // BLOCK_BYTES))
        else:
            entries.extend(block_checksums(part))
            data.append(bytes(part))
    return entries.tobytes() + b"".join(data)
