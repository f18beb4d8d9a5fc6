"""One open replica as its users see it, with or without a socket in between.

`ReplicaService` belongs to the loop of the process that opened the directory: the replica daemon
serves it to sessions; a volume daemon whose only replica is in a directory of its own machine uses
it without a second process (local_member.py). It shares flushes between callers, dispatches
control requests and does the background work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from blockd.daemons import process
from blockd.daemons.flushing import Done, Flushing
from blockd.daemons.replica_changes import ReplicaChanges
from blockd.daemons.replica_control import Content, ReplicaControl, describe_layer
from blockd.daemons.replica_control import Done as ControlDone
from blockd.daemons.replica_copying import ReplicaCopying
from blockd.loop import Loop
from protocol import replica as wire
from protocol.errors import BlockdError, ConflictError, StorageError
from protocol.units import BLOCK_BYTES, PIECE_BYTES_MAX
from snapshots.replica import MAINTAIN_BLOCKS, Replica

READ_BLOCKS_MAX = (
    PIECE_BYTES_MAX // BLOCK_BYTES
)  # of one read, or of several that are read together
MAINTAIN_DELAY_SECONDS = 0.02  # between steps of background work, so that requests come first
IDLE_DELAY_SECONDS = 0.001  # the same while there are none
IDLE_BLOCKS = 1024  # of one step while there are no requests; one that comes waits for it


def next_part(counts: Sequence[int], at: int, most: int) -> tuple[int, int]:
    """How many ranges from number `at` on to read together, and their blocks (READ_BLOCKS_MAX)."""
    part = counts[at : at + most]
    blocks = sum(part)
    return (len(part), blocks) if blocks <= READ_BLOCKS_MAX else (1, part[0])


class ReplicaService:
    """One open replica in the loop that owns it."""

    def __init__(self, loop: Loop, replica: Replica) -> None:
        self.loop = loop
        self.replica = replica
        self.reads = 0
        self.writes = 0
        self.epoch = 0  # of the newest fenced session
        self.clean_start = replica.clean_start
        replica.shared = True
        self._incarnation = os.urandom(8).hex()
        self._boot_id = loop.boot_id()
        self._refused = ""  # set when a write was not applied: our place in the order means nothing
        self.flushing = Flushing(loop, replica)
        self._maintaining = False
        self._seen = (0, 0)  # reads and writes at the last step of background work
        self._closed = False
        self.changes = ReplicaChanges(self)
        self.controls = ReplicaControl(self)
        self.copying = ReplicaCopying(self)
        if replica.metadata.unshare:
            self.worked()

    @property
    def unbroken(self) -> bool:
        """No reboot since an owner last called it equal: nothing it applied can have been lost.

        A fence alone does not count: an owner that ends before it has judged the members must not
        make one that has lost something look as if it had not.
        """
        return self.replica.metadata.fenced_boot == self._boot_id

    def trusted(self) -> None:
        """The owner found this replica equal, and the record says so: durably remember the boot."""
        if not self.unbroken:
            self.replica.commit_changes(fenced_boot=self._boot_id)

    # ---- what sessions ask ------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a volume daemon needs to know of this replica."""
        metadata = self.replica.metadata
        return {
            "version": wire.VERSION,
            "replica_uuid": metadata.replica_uuid,
            "volume_uuid": metadata.volume_uuid,
            "volume_name": metadata.volume_name,
            "size_bytes": metadata.size_bytes,
            "promised_epoch": metadata.promised_epoch,
            "config_seq": self.replica.config_seq,
            "complete": self.replica.complete,
            "clean_start": self.clean_start,
            "incarnation": self._incarnation,
            "boot_id": self._boot_id,
            "position": [*self.changes.position, self._refused],
            "recent": self.changes.describe(),
            "unbroken": self.unbroken,
            "head_id": metadata.head_id,
            "layers": [describe_layer(info) for info in self.replica.tree()],
        }

    def promise(self, content: dict[str, Any]) -> None:
        """Promise an epoch durably and bind a blank replica; ConflictError if it is too old."""
        metadata = self.replica.metadata
        self.check_volume(str(content["volume_uuid"]))  # it may have been bound since the HELLO
        epoch = int(content["epoch"])
        if epoch < metadata.promised_epoch:
            raise ConflictError(
                f"epoch {epoch} is older than epoch {metadata.promised_epoch} promised by replica "
                f"{metadata.replica_uuid}: another volume daemon owns this volume"
            )
        if not metadata.volume_uuid:
            self.replica.bind(str(content["volume_uuid"]), str(content["volume_name"]))
        if epoch > metadata.promised_epoch:
            self.replica.promise(epoch)
        config_seq = int(content["config_seq"])
        if config_seq > self.replica.config_seq:
            self.replica.store_config(config_seq, dict(content["config"]))
        self.epoch = epoch
        self.flushing.new_owner()

    def check_volume(self, asked: str) -> None:
        """ConflictError unless the replica is blank or belongs to the volume `asked`."""
        metadata = self.replica.metadata
        if metadata.volume_uuid and asked != metadata.volume_uuid:
            raise ConflictError(
                f"replica {metadata.replica_uuid} at {self.replica.path} belongs to volume "
                f"{metadata.volume_name or metadata.volume_uuid} ({metadata.volume_uuid}), not "
                f"to {asked}; use the right state file or another directory"
            )

    def read_cold(
        self,
        first: int,
        count: int,
        layer_id: int,
        done: Callable[[memoryview | None, BlockdError | None], None],
    ) -> None:
        """Read a range that is not in memory, in a thread; if a write got in between, here.

        `done` gets the payload of a DATA answer about it, or the error.
        """
        replica = self.replica
        map_bytes = 4 * count
        buffer = memoryview(bytearray(map_bytes + wire.HEADROOM_BYTES + count * BLOCK_BYTES))
        target = memoryview(bytearray(count * (4 + BLOCK_BYTES)))

        def read_again(used: int, failure: BaseException | None) -> None:
            try:
                if failure is not None or used < 0:
                    used = replica.read_into(first, count, target, layer_id)
            except BlockdError as error:
                done(None, error)
                return
            data_bytes = used - map_bytes
            start = map_bytes + wire.HEADROOM_BYTES
            buffer[:map_bytes] = target[:map_bytes]
            buffer[start : start + data_bytes] = target[map_bytes:used]
            done(buffer[: start + data_bytes], None)

        self.loop.in_thread(lambda: replica.read_into(first, count, target, layer_id), read_again)

    def refused(self) -> None:
        """A write was refused: this replica is not comparable until it was filled anew."""
        self._refused = self._incarnation

    def released(self, user: object) -> None:
        """A session ended: what it had paused goes on."""
        self.controls.folding_paused_by.discard(user)

    def flush(self, done: Done, sequence: int = 0) -> None:
        """Make everything applied so far durable (flushing.py)."""
        if self._closed:
            done(StorageError(f"replica {self.replica.path} was closed"))
        else:
            self.flushing.flush(done, sequence)

    def stable(self, sequence: int, config_seq: int) -> None:
        """The owner's FLUSH with this sequence succeeded on every member of a configuration."""
        if self.flushing.stable(sequence, config_seq):
            self.worked()

    def close(self) -> bool:
        """Close the directory, cleanly if that is possible (True); nothing touches it then."""
        if self._closed:
            return True
        self.flushing.close()
        self._closed = True
        try:
            self.replica.close()
        except (BlockdError, OSError) as error:
            process.log(f"replica {self.replica.path} was not closed cleanly: {error}")
            return False
        return True

    def control(self, content: Content, user: object, done: ControlDone) -> None:
        """A CONTROL request of the fenced owner (replica_control.py)."""
        self.controls.run(content, user, done)

    def accepted(self) -> None:
        """The replica was made equal: what it refused before does not count."""
        self._refused = ""

    # ---- background work ------------------------------------------------------------------

    def worked(self) -> None:
        """Something changed: folding or clean-up may be due."""
        if not self._maintaining and not self._closed:
            self._maintaining = True
            idle = self._seen == (self.reads, self.writes)
            self.loop.later(IDLE_DELAY_SECONDS if idle else MAINTAIN_DELAY_SECONDS, self._maintain)

    def _maintain(self) -> None:
        """One step; a flush it needs runs in a thread like any other."""
        self._maintaining = False
        if self._closed:
            return
        replica = self.replica
        replica.hold_folding = bool(self.controls.folding_paused_by)
        if self.flushing.running or not replica.complete:
            if self.flushing.running:
                self.worked()
            return
        requests = (self.reads, self.writes)
        idle, self._seen = self._seen == requests, requests
        try:
            more = replica.maintain(IDLE_BLOCKS if idle else MAINTAIN_BLOCKS, inline_flush=False)
        except BlockdError as error:
            process.log(f"background work stopped: {error}")
            return
        if replica.flush_wanted:
            self.flush(lambda error: self.worked() if error is None else None)
        elif more:
            self.worked()
