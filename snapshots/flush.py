"""One flush: what has to become durable, collected in the event loop and done in a thread.

A failed fdatasync is final. The kernel has dropped the dirty pages and reports success next time,
so the store is marked failed and every later flush raises (see "fsyncgate", LWN 752063). Only a
full disk while writing replica.json is worth repeating: the old file is still in place then.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protocol.errors import StorageError
from snapshots import distrust
from snapshots.index import Index
from snapshots.layer import LayerFile
from snapshots.reserve import FULL_DISK
from snapshots.syscalls import sync_directory
from snapshots.zeroed import ZeroedMarks

if TYPE_CHECKING:
    from snapshots.store import Store


def failed_error(path: str) -> StorageError:
    """What a replica says after its disk has once failed to make data durable."""
    return StorageError(
        f"replica {path} has failed to make data durable and is no longer trusted; "
        "check the disk and rebuild the replica from another member"
    )


@dataclass(eq=False)
class FlushJob:
    """Made by `flush_begin`, run in any thread, handed back to `flush_end`."""

    store: Store
    sequence: int
    layers: list[LayerFile] = field(default_factory=list)
    marks: ZeroedMarks | None = None
    marks_changes: int = 0
    index: Index | None = None
    clearable: dict[int, int] = field(default_factory=dict)  # to clear once the index is durable
    cooled: list[int] = field(default_factory=list)
    sync_names: bool = False  # layer files were created
    metadata: tuple[int, bytes] | None = None
    condemned: list[str] = field(default_factory=list)  # files that are not needed from then on
    holds: list[LayerFile] = field(default_factory=list)  # their open files: freed in the thread
    succeeded: bool = False

    def covered_by(self, later: FlushJob) -> None:
        """`later`, begun before this one ended, was run in place of it."""
        self.succeeded = later.succeeded
        self.index = None  # only what ran has synced the index
        self.holds.clear()

    def run(self) -> None:
        """Make everything durable; raises StorageError."""
        store = self.store
        try:
            for layer in self.layers:
                os.fdatasync(layer.fd)
            if self.marks is not None and self.marks.fd >= 0:
                os.fdatasync(self.marks.fd)
            if self.index is not None:
                self.index.sync()
            if self.sync_names:
                sync_directory(os.path.join(store.path, "layers"))
        except OSError as error:
            store.failed = True
            distrust.mark(store.path)
            raise StorageError(
                f"making replica {store.path} durable: {error.strerror}; it is no longer trusted, "
                "check the disk and rebuild the replica from another member",
                errno=errno.EIO,
            ) from error
        if self.metadata is not None:
            store.check_open()
            try:
                store.file.write(self.metadata)
            except StorageError as error:
                store.failed = store.failed or error.errno not in FULL_DISK
                raise
        self.succeeded = True
        remove_files(self.condemned)
        self.holds.clear()  # the last reference may free gigabytes; better here than in the loop


def remove_files(paths: list[str]) -> None:
    """Unlink files; what is left over is removed by the next open."""
    for path in paths:
        try:
            os.unlink(path)
        except OSError:
            continue
