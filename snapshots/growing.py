"""A larger volume: longer files, then the new size in replica.json, then everything opened anew.

What is new reads as zeros. A crash before replica.json is written leaves longer files with the old
size, which is fine; after it the new size. Nothing that is stored is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

from protocol.errors import StateError, StorageError
from protocol.units import check_size
from snapshots import directory
from snapshots.logical import Logical
from snapshots.metadata import Metadata
from snapshots.syscalls import storage_error


class Growing(Logical):
    """See the module text."""

    def prepare_to_grow(self, size_bytes: int) -> Callable[[], None]:
        """What makes the files longer, for any thread; `grow` says what went wrong."""
        path, target = self.path, replace(self.metadata, size_bytes=size_bytes)

        def prepare() -> None:
            with contextlib.suppress(OSError):
                directory.extend_files(path, target)

        return prepare

    def grow(self, size_bytes: int) -> None:
        """Become at least `size_bytes` long, durably on return.

        A replica may be larger than its volume: its owner died while they were growing.
        """
        self.check_open()
        check_size(size_bytes)
        if size_bytes <= self.size_bytes:
            return
        if self._flushes_running:
            raise StateError("a flush is still running; repeat grow after it")
        self.flush()  # nothing is pending then that the tables made anew would not know of
        target = replace(self.metadata, size_bytes=size_bytes)
        try:
            directory.extend_files(self.path, target)
        except OSError as error:
            raise storage_error("extending replica", self.path, error) from error
        clearable, condemned = self._clearable, self._condemned
        self._open_anew(target)
        self._clearable, self._condemned = clearable, condemned
        self.content_replaced()

    def _open_anew(self, target: Metadata) -> None:
        """Commit to metadata whose files are there, and open them."""
        self.commit(target)
        try:
            with self.changing():
                self._load(target)
        except StorageError:
            self.failed = True
            raise

    def content_replaced(self) -> None:
        """Called when content was replaced from outside, or its tables were made anew."""
