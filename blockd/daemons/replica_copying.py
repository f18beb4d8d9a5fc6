"""Blocks of logical layers between members: the part of a replica's service that rebuilds use.

Reading and hashing wait for the disk in a thread; if layers changed meanwhile they are repeated in
the loop. What arrives is stored only if every block matches its checksum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from blockd.daemons.flushing import as_storage_error
from protocol import replica as wire
from protocol.checksum import ZEROS, block_checksums
from protocol.errors import BlockdError, NotFoundError, StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION
from snapshots.readpath import AGAIN

if TYPE_CHECKING:
    from blockd.daemons.replica_service import ReplicaService

Done = Callable[[memoryview | None, BlockdError | None], None]
Place = tuple[int, int, int, int]
"""layer id, id of its logical parent, first block, block count"""


class ReplicaCopying:
    """Copying from and to one replica, in the loop that owns it."""

    def __init__(self, service: ReplicaService) -> None:
        self._loop = service.loop
        self._replica = service.replica
        self._written = (0, 0)  # layer id and region of the last write

    def read(self, place: Place, done: Done) -> None:
        """The payload of a LAYER_DATA about some blocks."""
        layer_id, parent_id, first, count = place
        target = memoryview(bytearray(min(count, BLOCKS_PER_REGION) * (4 + BLOCK_BYTES)))

        def work() -> memoryview | None:
            used = self._replica.layer_read(layer_id, parent_id, first, count, target)
            return None if used == AGAIN else target[:used]

        self._in_thread(work, done)

    def digests(self, place: Place, done: Done, *, from_disk: bool = False) -> None:
        """The payload of a LAYER_DIGESTS about some blocks; `from_disk` as `layer_digests`."""

        def work() -> memoryview | None:
            digests = self._replica.layer_digests(*place, from_disk=from_disk)
            return memoryview(digests) if digests else None

        self._in_thread(work, done)

    def _in_thread(self, work: Callable[[], memoryview | None], done: Done) -> None:
        def ended(payload: memoryview | None, failure: BaseException | None) -> None:
            error = as_storage_error(failure) if failure is not None else None
            if payload is None and error is None:  # something got in between
                try:
                    payload = work()
                except BlockdError as again:
                    error = again
            done(payload, error)

        self._loop.in_thread(work, ended)

    def write(self, place: Place, payload: memoryview | None) -> None:
        """Store the payload of a LAYER_WRITE."""
        layer_id, parent_id, first, _ = place
        entries, data = self._checked(place, payload)
        self._replica.layer_write(layer_id, parent_id, first, entries, data)
        self._write_back(layer_id, first // BLOCKS_PER_REGION)

    def _write_back(self, layer_id: int, region: int) -> None:
        """The disk begins with a region when the next one is written: the flush is short then."""
        before, self._written = self._written, (layer_id, region)
        if before[0] and before != self._written:
            with contextlib.suppress(NotFoundError):  # it may be gone by now
                layer = self._replica.layer_file(before[0])
                work = partial(layer.begin_writing_back, before[1])
                self._loop.in_thread(work, lambda result, failure: None)

    def mend(self, place: Place, payload: memoryview | None) -> int:
        """Compare with the payload of a MEND and replace what is damaged; how many blocks."""
        layer_id, _, first, _ = place
        entries, data = self._checked(place, payload)
        return self._replica.mend(layer_id, first, entries, data)

    @staticmethod
    def _checked(place: Place, payload: memoryview | None) -> tuple[memoryview, memoryview]:
        """Entries and data of blocks that came from another member."""
        layer_id, _, first, count = place
        if payload is None or not count or len(payload) < 4 * count:
            raise wire.WireError(f"{count} blocks came without their map entries")
        entries, data = payload[: 4 * count].cast("I"), payload[4 * count :]
        expected = [entry for entry in entries if entry > ZEROS]
        if len(data) != len(expected) * BLOCK_BYTES:
            raise wire.WireError(f"{len(data)} bytes of data for {len(expected)} blocks")
        if block_checksums(data) != expected:
            raise StorageError(
                f"layer {layer_id} blocks {first} to {first + count}: one does not match its "
                "checksum at the source; verify the source replica"
            )
        return entries, data
