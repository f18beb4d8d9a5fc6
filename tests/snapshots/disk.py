"""A disk with a volatile cache under a replica's directory, for power cuts.

The files live on the real file system; this keeps aside what of them is durable. fsync, fdatasync
and RWF_DSYNC make a file, or the pages written, durable; a rename is durable at once (the code
under test always syncs the directory next). `cut_power` leaves, for each page changed since, the
durable or the current content, page by page or sector by sector as a coin decides. A page that was
a hole before comes whole or not at all: file systems make a new extent readable after its data is
written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from snapshots import metadata

PAGE_BYTES = 4096
SECTOR_BYTES = 512
ZERO = bytes(PAGE_BYTES)

Pages = dict[int, bytes]


def data_pages(fd: int) -> list[int]:
    """The pages of a sparse file that are no hole."""
    found: list[int] = []
    end, position = os.fstat(fd).st_size, 0
    while position < end:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
        except OSError:
            break
        hole = os.lseek(fd, position, os.SEEK_HOLE)
        found += range(position // PAGE_BYTES, -(-hole // PAGE_BYTES))
        position = -(-hole // PAGE_BYTES) * PAGE_BYTES
    return found


def read_pages(path: str) -> Pages:
    """The pages of a sparse file that are not zeros."""
    found: Pages = {}
    fd = os.open(path, os.O_RDONLY)
    try:
        for number in data_pages(fd):
            page = os.pread(fd, PAGE_BYTES, number * PAGE_BYTES).ljust(PAGE_BYTES, b"\0")
            if page != ZERO:
                found[number] = page
    finally:
        os.close(fd)
    return found


class VolatileDisk:
    """Watches the durability calls of this process on files below one directory."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = str(directory)
        self.durable: dict[str, Pages] = {}
        self.boots = 1
        real_fdatasync, real_pwritev, real_rename = os.fdatasync, os.pwritev, os.rename
        real_link = os.link

        def fsync(fd: int) -> None:
            real_fdatasync(fd)
            self._note(fd)

        def pwritev(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
            written = real_pwritev(fd, buffers, offset, flags)
            path = self._path(fd)
            if flags & os.RWF_DSYNC and path:
                data = b"".join(bytes(buffer) for buffer in buffers)
                pages = self.durable.setdefault(path, {})
                for start in range(0, len(data), PAGE_BYTES):
                    pages[(offset + start) // PAGE_BYTES] = data[start : start + PAGE_BYTES]
            return written

        def rename(source: str, target: str) -> None:
            real_rename(source, target)
            if source in self.durable:
                self.durable[target] = self.durable.pop(source)

        def link(source: str, target: str) -> None:
            real_link(source, target)
            self.durable[target] = dict(self.durable.get(source, {}))

        monkeypatch.setattr(metadata, "boot_id", lambda: f"boot {self.boots}")
        for name, function in (
            ("fsync", fsync),
            ("fdatasync", fsync),
            ("pwritev", pwritev),
            ("rename", rename),
            ("link", link),
        ):
            monkeypatch.setattr(os, name, function)

    def _path(self, fd: int) -> str:
        path = os.readlink(f"/proc/self/fd/{fd}")
        return path if path.startswith(self.directory) and os.path.isfile(path) else ""

    def _note(self, fd: int) -> None:
        path = self._path(fd)
        if path:
            self.durable[path] = read_pages(path)

    def cut_power(self, random: Random, below: str = "") -> None:
        """Rewrite all files (`below` a directory) to something a power cut could have left."""
        self.boots += 1
        for path in self._files():
            if path.startswith(below):
                self._settle(path, random)

    def cut_power_keeping(self, kept: Callable[[str, int], bool]) -> None:
        """A power cut where `kept(file name, page number)` says which changed pages survive."""
        self.boots += 1
        for path in self._files():
            before, now = self.durable.get(path, {}), read_pages(path)
            with open(path, "r+b", buffering=0) as file:
                for number in {*before, *now}:
                    if not kept(os.path.basename(path), number):
                        page = before.get(number, ZERO)
                        os.pwrite(file.fileno(), page, number * PAGE_BYTES)
            self.durable[path] = read_pages(path)

    def _files(self) -> list[str]:
        """All files a cut can damage: what is renamed into place is durable before."""
        return [
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.directory)
            for name in names
            if not name.endswith((".json", "lock"))
        ]

    def _settle(self, path: str, random: Random) -> None:
        before, now = self.durable.get(path, {}), read_pages(path)
        kept: Pages = {}
        bias = random.choice((0.1, 0.5, 0.9))
        fd = os.open(path, os.O_RDWR)
        try:
            for number in sorted({*before, *now}):
                old, new = before.get(number, ZERO), now.get(number, ZERO)
                if old != ZERO and random.random() < 0.3:
                    page = b"".join(
                        (new if random.random() < bias else old)[start : start + SECTOR_BYTES]
                        for start in range(0, PAGE_BYTES, SECTOR_BYTES)
                    )
                else:
                    page = new if random.random() < bias else old
                kept[number] = page
                if page != new:
                    os.pwrite(fd, page, number * PAGE_BYTES)
        finally:
            os.close(fd)
        self.durable[path] = {number: page for number, page in kept.items() if page != ZERO}
