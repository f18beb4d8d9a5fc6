"""Records what one process does to the files below a directory, as a disk would see it.

Time is a counter: every call that changes a file, a name or what is durable is one event, and every
change through a memory mapping that is found before such a call is one, too. For each page of each
file all its contents are kept with the time from which on they were there, and for each directory
all changes of names. What a power cut at some time may leave follows from these and from the times
of fsync, fdatasync and RWF_DSYNC (states.py).

Pages are 4 KiB. A page that is a hole, or allocated and never written, is None. The functions of
`os` are replaced while `Recorder` is installed, and the fallocate of snapshots/syscalls.py.
"""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from snapshots import metadata, syscalls
from snapshots.layer import map_offset
from snapshots.syscalls import FALLOC_FL_PUNCH_HOLE
from tests.snapshots.disk import PAGE_BYTES, data_pages

_CALLS = ("open", "pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "rename", "unlink")

Page = bytes | None


@dataclass(eq=False)
class Inode:
    """One file and its past."""

    fd: int  # of the recorder's own: the file stays readable after its name is gone
    mapped: tuple[int, ...] = ()  # pages that can change without a call
    pages: dict[int, list[tuple[int, Page]]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    syncs: list[int] = field(default_factory=list)
    page_syncs: dict[int, list[int]] = field(default_factory=dict)
    size_syncs: list[int] = field(default_factory=list)  # what was synced can be reached, too

    def newest(self, page: int) -> Page:
        versions = self.pages.get(page)
        return versions[-1][1] if versions else None

    def possible(self, page: int, time: int) -> list[Page]:
        """What may be on the disk: the content at the last sync, and all later ones, in order."""
        versions = self.pages[page]
        floor = _last(self.syncs, time)
        if page in self.page_syncs:
            floor = max(floor, _last(self.page_syncs[page], time))
        found: list[Page] = [None]
        for at, content in versions:
            if at <= floor:
                found = [content]
            elif at <= time:
                found.append(content)
        return found

    def possible_sizes(self, time: int) -> list[int]:
        """The same of its length."""
        floor, found = max(_last(self.syncs, time), _last(self.size_syncs, time)), [0]
        for at, size in self.sizes:
            if at <= floor:
                found = [size]
            elif at <= time:
                found.append(size)
        return found


def _last(times: list[int], time: int) -> int:
    """The last of some ascending times up to `time`; -1 if there is none."""
    at = bisect.bisect_right(times, time)
    return times[at - 1] if at else -1


NameChange = tuple[int, str, str, str, Inode | None]
"""time; "link", "unlink" or "rename"; name; new name; inode of a link"""


@dataclass
class Directory:
    """The names in one directory and their past."""

    changes: list[NameChange] = field(default_factory=list)
    syncs: list[int] = field(default_factory=list)

    def split(self, time: int) -> tuple[list[NameChange], list[NameChange]]:
        """Changes that are durable, and those that may have happened."""
        floor = _last(self.syncs, time)
        durable = [change for change in self.changes if change[0] <= floor]
        return durable, [change for change in self.changes if floor < change[0] <= time]


@dataclass
class Segment:
    """The time between two power cuts: what is there at its begin is durable."""

    begin: int
    directories: dict[str, Directory] = field(default_factory=dict)
    inodes: list[Inode] = field(default_factory=list)


class Recorder:
    """See the module text. `boundaries` are the times at which something became durable."""

    def __init__(self, root: str, region_count: int) -> None:
        self.root = root
        self.time = 0
        self.boundaries: list[tuple[int, str]] = []
        self.segments: list[Segment] = []
        self.boot = 1
        self.before_sync: Callable[[], None] = lambda: None  # work of others in between
        self.lying = ""  # a sync of a file or directory whose path ends like this does nothing
        self._map_pages = tuple(map_offset(r) // PAGE_BYTES for r in range(region_count))
        self._by_number: dict[int, Inode] = {}
        self._real: dict[str, Any] = {}

    # ---- starting and ending a segment ----------------------------------------------------------

    def begin_segment(self) -> None:
        """All files as they are now are durable."""
        self.time += 1
        segment = Segment(self.time)
        self._close_inodes()
        self.segments.append(segment)
        for folder, _, names in os.walk(self.root):
            directory = segment.directories[folder] = Directory(syncs=[self.time])
            for name in sorted(names):
                inode = self._add(os.path.join(folder, name))
                for page in data_pages(inode.fd):
                    self._note(inode, page)
                inode.sizes.append((self.time, os.fstat(inode.fd).st_size))
                inode.syncs.append(self.time)
                directory.changes.append((self.time, "link", name, "", inode))

    def segment_at(self, time: int) -> Segment:
        """The segment a time lies in."""
        return [segment for segment in self.segments if segment.begin <= time][-1]

    def _close_inodes(self) -> None:
        for inode in self._by_number.values():
            os.close(inode.fd)
        self._by_number.clear()

    def _add(self, path: str) -> Inode:
        fd = self._real.get("open", os.open)(path, os.O_RDWR)
        pages: tuple[int, ...] = ()
        if path.endswith(".layer"):
            pages = self._map_pages
        elif path.endswith(("index", ".zeroed")):
            pages = tuple(range(len(self._map_pages) // 4 + 1))
        inode = Inode(fd, pages)
        self._by_number[os.fstat(fd).st_ino] = inode
        self.segments[-1].inodes.append(inode)
        return inode

    # ---- noticing -------------------------------------------------------------------------------

    def _of(self, fd: int) -> Inode | None:
        return self._by_number.get(os.fstat(fd).st_ino)

    def _note(self, inode: Inode, page: int, *, hole: bool = False) -> None:
        """A page has a new content at this time."""
        content: Page = None
        if not hole:
            content = os.pread(inode.fd, PAGE_BYTES, page * PAGE_BYTES)
            if not content:
                return
            content = content.ljust(PAGE_BYTES, b"\0")
        versions = inode.pages.setdefault(page, [])
        if not versions or versions[-1][1] != content:
            versions.append((self.time, content))

    def scan(self) -> None:
        """Find what changed through mappings since the last event; that is an event, too."""
        changed = []
        for inode in self._by_number.values():
            for page in inode.mapped:
                now, known = os.pread(inode.fd, PAGE_BYTES, page * PAGE_BYTES), inode.newest(page)
                if now != known and (known is not None or now.strip(b"\0")):
                    changed.append((inode, page))
        if changed:
            self.time += 1
            for inode, page in changed:
                self._note(inode, page)

    def _event(self) -> None:
        self.scan()
        self.time += 1

    def _written(self, inode: Inode, offset: int, length: int) -> None:
        for page in range(offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)):
            self._note(inode, page)
        self._sized(inode)

    def _sized(self, inode: Inode) -> None:
        size = os.fstat(inode.fd).st_size
        if not inode.sizes or inode.sizes[-1][1] != size:
            inode.sizes.append((self.time, size))

    def _synced(self, what: str) -> None:
        self.boundaries.append((self.time, what))

    # ---- the calls ------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the calls."""
        self._real = {name: getattr(os, name) for name in _CALLS}
        self._real["fallocate"] = syscalls.fallocate
        with (
            mock.patch.multiple(os, **{name: getattr(self, f"_{name}") for name in _CALLS}),
            mock.patch.object(syscalls, "fallocate", self._fallocate),
            mock.patch.object(metadata, "boot_id", side_effect=lambda: f"boot {self.boot}"),
        ):
            yield
        self._real = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done to the files meanwhile is not recorded."""
        with mock.patch.multiple(os, **{name: self._real[name] for name in _CALLS}):
            yield

    def _place(self, path: Any) -> tuple[Directory, str] | None:
        folder, name = os.path.split(os.fspath(path))
        directory = self.segments[-1].directories.get(folder)
        return (directory, name) if directory is not None else None

    def _open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        place = self._place(path) if flags & (os.O_CREAT | os.O_TRUNC) else None
        is_new = place is not None and not os.path.exists(path)
        if place is not None:
            self._event()
        fd: int = self._real["open"](path, flags, mode)
        if place is None:
            return fd
        if is_new:
            inode = self._add(os.fspath(path))
            inode.sizes.append((self.time, 0))
            place[0].changes.append((self.time, "link", place[1], "", inode))
        elif flags & os.O_TRUNC:
            self._shortened(self._of(fd))
        return fd

    def _shortened(self, inode: Inode | None) -> None:
        if inode is not None:
            self._sized(inode)
            end = -(-inode.sizes[-1][1] // PAGE_BYTES)
            for page in [number for number in inode.pages if number >= end]:
                self._note(inode, page, hole=True)

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        inode = self._of(fd)
        if inode is not None:
            self._event()
        written: int = self._real["pwrite"](fd, data, offset)
        if inode is not None:
            self._written(inode, offset, written)
        return written

    def _pwritev(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        inode = self._of(fd)
        if inode is not None:
            self._event()
        written: int = self._real["pwritev"](fd, buffers, offset, flags)
        if inode is not None:
            self._written(inode, offset, written)
            if flags & os.RWF_DSYNC and not self._lies(fd):
                self.time += 1  # before this, the write was under way
                for page in range(offset // PAGE_BYTES, -(-(offset + written) // PAGE_BYTES)):
                    inode.page_syncs.setdefault(page, []).append(self.time)
                inode.size_syncs.append(self.time)
                self._synced("dsync " + self._name(fd))
        return written

    def _ftruncate(self, fd: int, length: int) -> None:
        inode = self._of(fd)
        if inode is not None:
            self._event()
        self._real["ftruncate"](fd, length)
        if inode is not None:
            self._shortened(inode)

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        inode = self._of(fd)
        if inode is not None:
            self._event()
        self._real["fallocate"](fd, mode, offset, length)
        if inode is not None and mode & FALLOC_FL_PUNCH_HOLE:
            for page in range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES):
                if page in inode.pages:
                    self._note(inode, page, hole=True)

    def _fsync(self, fd: int) -> None:
        self._sync(fd, "fsync")

    def _fdatasync(self, fd: int) -> None:
        self._sync(fd, "fdatasync")

    def _sync(self, fd: int, what: str) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            directory = self.segments[-1].directories.get(os.readlink(f"/proc/self/fd/{fd}"))
            if directory is not None and not self._lies(fd):
                self._event()
                directory.syncs.append(self.time)
                self._synced("fsync " + self._name(fd))
            return
        inode = self._of(fd)
        if inode is None:
            return
        self.before_sync()
        self._event()
        if not self._lies(fd):
            inode.syncs.append(self.time)
            self._synced(f"{what} {self._name(fd)}")

    def _rename(self, source: Any, target: Any) -> None:
        place, to = self._place(source), self._place(target)
        self._event()
        self._real["rename"](source, target)
        if place is not None and to is not None:
            place[0].changes.append((self.time, "rename", place[1], to[1], None))

    def _unlink(self, path: Any) -> None:
        place = self._place(path)
        self._event()
        self._real["unlink"](path)
        if place is not None:
            place[0].changes.append((self.time, "unlink", place[1], "", None))

    def _name(self, fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.root)

    def _lies(self, fd: int) -> bool:
        return bool(self.lying) and os.readlink(f"/proc/self/fd/{fd}").endswith(self.lying)
