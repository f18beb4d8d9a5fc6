"""A disk with a volatile cache below each replica directory, and everything that can go wrong.

The files are real (on a memory file system); this knows what of them is durable. For every page
changed since its file was last synced it keeps the durable content (`before`); pages that are
written through a memory map (layer maps, index, marks) are compared with a copy made at the last
sync. `cut_power` rewrites changed pages: old or new, whole or by 512-byte sectors. A page that was
a hole before comes whole or not at all, and names (create, rename, unlink) are durable at once: the
code under test syncs directories right away.

A failed sync is final as in Linux: the pages count as clean afterwards, nobody hears of them again,
and the next power cut loses them, unless they are written again (`lost`).

The functions of `os` that `snapshots` uses are replaced while a simulation runs; descriptors of
other files pass through.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import Any
from unittest import mock

from greenlet import getcurrent

from snapshots import syscalls
from snapshots.layer import REGION_STRIDE_BYTES
from tests.sim.kernel import Kernel

PAGE = 4096
SECTOR = 512
ZERO = bytes(PAGE)
LAYER_STRIDE_PAGES = REGION_STRIDE_BYTES // PAGE

real_open, real_close, real_pwrite, real_pwritev = os.open, os.close, os.pwrite, os.pwritev
real_pread, real_rename, real_unlink, real_link = os.pread, os.rename, os.unlink, os.link
real_ftruncate, real_fallocate = os.ftruncate, syscalls.fallocate

Pages = dict[int, bytes]


class File:
    """One file: which pages differ from what is durable."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.disk = disk
        self.fd = real_open(path, os.O_RDWR)  # of our own, as long as the file exists
        self.path = path
        self.before: Pages = {}  # durable content of pages written since the last sync
        self.lost: Pages = {}  # the same of pages that a failed sync forgot
        self.mapped: Pages = {}  # durable content of memory-mapped pages that are not zeros
        self.rewritten: set[int] = set()  # mapped pages written by a call: dirty whatever they are
        self._seen: Pages = {}  # their content at the last sync, also a failed one

    def close(self) -> None:
        real_close(self.fd)

    def page(self, number: int) -> bytes:
        return real_pread(self.fd, PAGE, number * PAGE).ljust(PAGE, b"\0")

    def is_mapped(self, number: int) -> bool:
        if self.path.endswith(".layer"):
            return number % LAYER_STRIDE_PAGES == 1
        return self.path.endswith((".zeroed", "index"))

    def mapped_pages(self) -> Pages:
        """The memory-mapped pages that are not zeros now."""
        size = os.fstat(self.fd).st_size // PAGE
        if self.path.endswith(".layer"):
            numbers = range(1, size, LAYER_STRIDE_PAGES)
        elif self.path.endswith((".zeroed", "index")):
            numbers = range(size)
        else:
            return {}
        pages = ((number, self.page(number)) for number in numbers)
        return {number: page for number, page in pages if page != ZERO}

    def touch(self, first: int, last: int) -> None:
        """These pages are about to be written."""
        for number in range(first, last + 1):
            if number not in self.before and not self.is_mapped(number):
                self.before[number] = self.lost.pop(number, b"") or self.page(number)
            elif number not in self.before:
                self.rewritten.add(number)

    def synced(self) -> None:
        """Everything but what was lost is durable."""
        self.before.clear()
        now = self.mapped_pages()
        for number in sorted(self.rewritten):
            self.mapped[number] = now.get(number, ZERO)
        self.rewritten.clear()
        for number in {**now, **self._seen}:
            page = now.get(number, ZERO)
            if page != self._seen.get(number, ZERO):
                self.mapped[number] = page
            # A page that has not changed since a failed sync is not written again.
        self._seen = now

    def sync_failed(self) -> None:
        """The kernel calls the pages clean and forgets them."""
        for number, page in self.before.items():
            self.lost.setdefault(number, page)
        self.before.clear()
        self.rewritten.clear()
        self._seen = self.mapped_pages()

    def cut(self, random: Random, keep: float, tear: float) -> None:
        """Write what a power cut could leave of the file."""
        now = self.mapped_pages()
        changed = [
            (number, self.mapped.get(number, ZERO), now.get(number, ZERO), number not in self._seen
             or self._seen[number] != now.get(number, ZERO))
            for number in sorted({**now, **self.mapped})
            if self.mapped.get(number, ZERO) != now.get(number, ZERO)
        ]  # fmt: skip
        changed += [(n, old, self.page(n), True) for n, old in sorted(self.before.items())]
        changed += [(n, old, self.page(n), False) for n, old in sorted(self.lost.items())]
        for number, old, new, can_survive in changed:
            chance = keep if can_survive else 0.0
            if old != ZERO and random.random() < tear:
                page = b"".join(
                    (new if random.random() < chance else old)[start : start + SECTOR]
                    for start in range(0, PAGE, SECTOR)
                )
            else:
                page = new if random.random() < chance else old
            if page != new:
                real_pwrite(self.fd, page, number * PAGE)
        self.before.clear()
        self.lost.clear()
        self.rewritten.clear()
        self.mapped = self.mapped_pages()
        self._seen = dict(self.mapped)


class Disk:
    """All files of one host below a directory."""

    def __init__(self, kernel: Kernel, directory: str) -> None:
        self.kernel = kernel
        self.directory = directory
        self.files: dict[str, File] = {}
        self.free_pages: int | None = None  # None: plenty
        self.failing_syncs = 0  # so many of the next syncs fail
        self.failing_writes = 0
        self.misdirect_next = False
        self.misdirected: list[tuple[str, int, int]] = []  # file, page meant, page hit
        self.slow_seconds = 0.0  # mean of each write and sync
        self.touched = False

    def heal(self) -> None:
        """Nothing is wrong with it from now on."""
        self.free_pages = None
        self.failing_syncs = self.failing_writes = 0
        self.misdirect_next = False
        self.slow_seconds = 0.0

    def cut_power(self, keep: float, tear: float) -> None:
        """What was not synced survives with the chance `keep`, perhaps in part."""
        for path in sorted(self.files):
            if not path.endswith((".json", "lock", ".tmp", "distrusted")):
                self.files[path].cut(self.kernel.random, keep, tear)

    def work(self) -> None:
        """One write or sync was done: it takes time, and the process waits for it."""
        process = self.kernel.current
        if self.slow_seconds and process is not None:
            process.stop_for(self.kernel.random.expovariate(1.0 / self.slow_seconds))

    def take(self, file: File, first: int, last: int) -> int:
        """Space for pages that are holes; how many of these pages, from the first on, have it."""
        if self.free_pages is None:
            return last - first + 1
        for number in range(first, last + 1):
            if _is_hole(file.fd, number):
                if self.free_pages <= 0:
                    return number - first
                self.free_pages -= 1
        return last - first + 1

    def give(self, count: int) -> None:
        if self.free_pages is not None:
            self.free_pages += count


def _is_hole(fd: int, number: int) -> bool:
    try:
        return os.lseek(fd, number * PAGE, os.SEEK_DATA) != number * PAGE
    except OSError:
        return True


class Disks:
    """All disks; replaces functions of `os` while it is entered."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.disks: list[Disk] = []
        self._fds: dict[int, File] = {}
        self._stack = ExitStack()

    def add(self, directory: str) -> Disk:
        disk = Disk(self.kernel, directory)
        self.disks.append(disk)
        return disk

    def __enter__(self) -> Disks:
        replaced: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "close": self._close,
            "pwrite": self._pwrite,
            "pwritev": self._pwritev,
            "fsync": self._fsync,
            "fdatasync": self._fdatasync,
            "rename": self._rename,
            "unlink": self._unlink,
            "link": self._link,
            "ftruncate": self._ftruncate,
            "urandom": self.kernel.entropy.randbytes,
        }
        for name, function in replaced.items():
            self._stack.enter_context(mock.patch.object(os, name, function))
        self._stack.enter_context(mock.patch.object(syscalls, "fallocate", self._fallocate))
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()
        for disk in self.disks:
            for file in set(disk.files.values()):
                file.close()
            disk.files.clear()

    # ---- names --------------------------------------------------------------------------------

    def _disk(self, path: str) -> Disk | None:
        return next((d for d in self.disks if path.startswith(d.directory)), None)

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        fd = real_open(path, flags, mode, **more)
        disk = self._disk(path) if isinstance(path, str) else None
        self._fds.pop(fd, None)
        if disk is not None and not flags & os.O_DIRECTORY:
            file = disk.files.get(path)
            if file is None:
                file = disk.files[path] = File(disk, path)
            elif flags & os.O_TRUNC:
                file.before.clear()
            self._fds[fd] = file
        return fd

    def _close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        real_close(fd)

    def _rename(self, source: str, target: str) -> None:
        real_rename(source, target)
        disk = self._disk(source)
        if disk is not None and source in disk.files:
            file = disk.files.pop(source)
            old = disk.files.pop(target, None)
            if old is not None:
                disk.give(os.fstat(old.fd).st_blocks // 8)
                old.close()
            file.path = target
            disk.files[target] = file

    def _link(self, source: str, target: str) -> None:
        """One file with two names."""
        real_link(source, target)
        disk = self._disk(source)
        if disk is not None:
            if source not in disk.files:
                disk.files[source] = File(disk, source)
            disk.files[target] = disk.files[source]

    def _unlink(self, path: str) -> None:
        real_unlink(path)
        disk = self._disk(path)
        if disk is not None and path in disk.files:
            file = disk.files.pop(path)
            left = [name for name, other in disk.files.items() if other is file]
            if left:
                file.path = left[0]
                return
            disk.give(os.fstat(file.fd).st_blocks // 8)
            file.close()
            for fd, other in list(self._fds.items()):
                if other is file:  # open still, but no crash will show it to anybody
                    del self._fds[fd]

    # ---- content ------------------------------------------------------------------------------

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        file = self._fds.get(fd)
        if file is None:
            return real_pwrite(fd, data, offset)
        disk = file.disk
        if disk.failing_writes and file.path.endswith(".layer"):
            disk.failing_writes -= 1
            raise OSError(errno.EIO, "simulated write error")
        first, last = offset // PAGE, (offset + len(data) - 1) // PAGE
        if disk.misdirect_next and file.path.endswith(".layer") and first > 1:
            hit = self._elsewhere(file, first)
            if hit:
                disk.misdirect_next = False
                disk.misdirected.append((file.path, first, hit))
                file.touch(hit, hit)
                real_pwrite(fd, bytes(data[:PAGE]), hit * PAGE)
                return PAGE
        if disk.free_pages is not None:
            there = disk.take(file, first, last)
            if there == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if there < last - first + 1:
                data = memoryview(data)[: (first + there) * PAGE - offset]
                last = first + there - 1
        file.touch(first, last)
        if disk.slow_seconds:
            disk.work()
        return real_pwrite(fd, data, offset)

    def _elsewhere(self, file: File, page: int) -> int:
        """Another data page that is in use."""
        near = [n for n in range(max(2, page - 8), page + 9) if n != page and not file.is_mapped(n)]
        used = [n for n in near if not _is_hole(file.fd, n)]
        return self.kernel.random.choice(used) if used else 0

    def _pwritev(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        file = self._fds.get(fd)
        if file is None:
            return real_pwritev(fd, buffers, offset, flags)
        data = b"".join(bytes(buffer) for buffer in buffers)
        first, last = offset // PAGE, (offset + len(data) - 1) // PAGE
        if flags & os.RWF_DSYNC and file.disk.failing_syncs:
            file.disk.failing_syncs -= 1
            raise OSError(errno.EIO, "simulated write error")
        file.touch(first, last)
        written = real_pwritev(fd, buffers, offset)
        if flags & os.RWF_DSYNC:
            for number in range(first, last + 1):
                file.before.pop(number, None)
                if file.is_mapped(number):
                    page = file.page(number)
                    file.mapped[number] = file._seen[number] = page
        return written

    def _fdatasync(self, fd: int) -> None:
        """In a thread it takes time, in which other things happen."""
        process = self.kernel.current
        here = getcurrent()
        thread = None
        if process is not None:
            thread = next((t for t in process.threads if t.greenlet is here), None)
        if thread is not None and process is not None:
            file = self._fds.get(fd)
            slow = file.disk.slow_seconds if file is not None else 0.0
            delay = self.kernel.random.expovariate(1.0 / (2e-4 + 4 * slow))
            thread.wake = self.kernel.at(delay, process, here.switch)
            if self.kernel.random.random() < 0.5:  # what is written meanwhile is not covered
                try:
                    self._fsync(fd)
                finally:
                    self.kernel.pause()
                    thread.wake = None
                return
            self.kernel.pause()
            thread.wake = None
        self._fsync(fd)

    def _fsync(self, fd: int) -> None:
        file = self._fds.get(fd)
        if file is None:
            return
        if file.disk.failing_syncs:
            file.disk.failing_syncs -= 1
            file.sync_failed()
            raise OSError(errno.EIO, "simulated sync error")
        file.synced()
        if file.disk.slow_seconds:
            file.disk.work()

    def _ftruncate(self, fd: int, length: int) -> None:
        file = self._fds.get(fd)
        if file is not None and file.disk.free_pages is not None:
            before = os.fstat(fd).st_blocks
            real_ftruncate(fd, length)
            file.disk.give((before - os.fstat(fd).st_blocks) // 8)
        else:
            real_ftruncate(fd, length)

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        file = self._fds.get(fd)
        if file is None or not length:
            real_fallocate(fd, mode, offset, length)
            return
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        if mode & syscalls.FALLOC_FL_PUNCH_HOLE:
            self._punch(file, first, last)
        elif file.disk.free_pages is not None:
            there = file.disk.take(file, first, last)
            if there < last - first + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fallocate(fd, mode, offset, length)

    @staticmethod
    def _punch(file: File, first: int, last: int) -> None:
        """Keep what is punched out, as far as there is anything."""
        position, end = first * PAGE, (last + 1) * PAGE
        while position < end:
            try:
                position = os.lseek(file.fd, position, os.SEEK_DATA)
            except OSError:
                return
            if position >= end:
                return
            stop = min(os.lseek(file.fd, position, os.SEEK_HOLE), end)
            file.touch(position // PAGE, (stop - 1) // PAGE)
            file.disk.give((stop - position) // PAGE)
            position = stop


def flip_bit(file: File, random: Random) -> tuple[int, int] | None:
    """Damage one data block of a layer, or its checksum, on the disk and in memory.

    (page, region of the damaged map or -1) if there was anything to damage.
    """
    maps = sorted(file.mapped_pages())
    if not maps:
        return None
    number = random.choice(maps)
    entries = memoryview(file.page(number)).cast("I")
    used = [block for block in range(len(entries)) if entries[block] > 3]
    if not used:
        return None
    block = random.choice(used)
    if random.random() < 0.7:
        page, at = number + 1 + block, random.randrange(PAGE)
    else:
        page, at = number, 4 * block + random.randrange(4)
    content = bytearray(file.page(page))
    content[at] ^= 1 << random.randrange(8)
    real_pwrite(file.fd, content, page * PAGE)
    return page, block
