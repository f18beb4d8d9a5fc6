"""What a power cut may leave of what was recorded, and making a directory of it.

Of each page: its content at the last sync or any later one; or some sectors of one and some of a
later one, unless it was a hole in between (a new extent becomes readable only after its data is
written: ext4, XFS). Of each length: the same. Of the names of a directory: what was synced, and of
the changes since then the first ones, as a journal has them, or any others, as POSIX allows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.powercut.recorder import PAGE_BYTES, Directory, Inode, NameChange, Page, Recorder

SECTOR_BYTES = 512
TORN_SHARE = 0.3  # of pages that can be torn
JOURNAL_SHARE = 0.6  # of states whose names are as a journal leaves them

Names = dict[str, Inode]


@dataclass
class Content:
    """One file as the cut left it."""

    size: int
    pages: dict[int, bytes]


State = dict[str, dict[str, Content]]
"""directory to name to file"""


@dataclass
class Choice:
    """How to choose among what is possible."""

    page: Callable[[Inode, int, list[Page]], Page]
    size: Callable[[list[int]], int]
    names: Callable[[list[NameChange]], list[NameChange]]


NOTHING = Choice(lambda inode, number, all: all[0], lambda all: all[0], lambda pending: [])
EVERYTHING = Choice(lambda inode, number, all: all[-1], lambda all: all[-1], lambda all: all)


def random_choice(random: Random) -> Choice:
    """Anything goes; files and kinds of pages have their luck together, or alone."""
    bias: dict[tuple[Inode, bool], float] = {}

    def page(inode: Inode, number: int, all: list[Page]) -> Page:
        kind = (inode, number in inode.mapped)
        share = bias.setdefault(kind, random.choice((0.0, 0.1, 0.5, 0.9, 1.0)))
        if random.random() < share:
            at = len(all) - 1
        elif random.random() < 0.7:
            at = 0
        else:
            at = random.randrange(len(all))
        first = at
        while first and all[first] is not None and all[first - 1] is not None:
            first -= 1
        newer = all[at]
        older = all[random.randrange(first, at + 1)]
        if newer is None or older is None or older == newer or random.random() > TORN_SHARE:
            return newer
        return b"".join(
            (newer if random.random() < 0.5 else older)[start : start + SECTOR_BYTES]
            for start in range(0, PAGE_BYTES, SECTOR_BYTES)
        )

    journal = random.random() < JOURNAL_SHARE

    def names(pending: list[NameChange]) -> list[NameChange]:
        if journal:
            return pending[: random.randint(0, len(pending))]
        return [change for change in pending if random.random() < 0.5]

    return Choice(page, lambda all: random.choice((all[0], all[-1])), names)


def one_kind(inode_number: int, *, kept: bool, recorder: Recorder, time: int) -> Choice:
    """Only one file reached the disk, or all but one."""
    inodes = recorder.segment_at(time).inodes
    chosen = inodes[inode_number % len(inodes)]

    def page(inode: Inode, number: int, all: list[Page]) -> Page:
        return all[-1] if (inode is chosen) == kept else all[0]

    return Choice(page, lambda all: all[-1], lambda pending: pending)


def after_cut(recorder: Recorder, time: int, choice: Choice) -> State:
    """One state a power cut at `time` may leave."""
    state: State = {}
    for path, directory in recorder.segment_at(time).directories.items():
        files = state[path] = {}
        for name, inode in _names(directory, time, choice).items():
            files[name] = _content(inode, time, choice)
    return state


def _names(directory: Directory, time: int, choice: Choice) -> Names:
    durable, pending = directory.split(time)
    names: Names = {}
    for _, kind, name, new_name, inode in [*durable, *choice.names(pending)]:
        if kind == "link":
            assert inode is not None
            names[name] = inode
        elif kind == "unlink":
            names.pop(name, None)
        elif name in names:
            names[new_name] = names.pop(name)
    return names


def _content(inode: Inode, time: int, choice: Choice) -> Content:
    size = choice.size(inode.possible_sizes(time))
    pages: dict[int, bytes] = {}
    for number in inode.pages:
        content = choice.page(inode, number, inode.possible(number, time))
        if content is not None and number * PAGE_BYTES < size:
            pages[number] = content
    return Content(size, pages)


def make(state: State, root: str, target: str) -> None:
    """Make `target` what the recorded directory `root` was left as."""
    shutil.rmtree(target, ignore_errors=True)
    for folder, files in sorted(state.items()):
        path = os.path.normpath(os.path.join(target, os.path.relpath(folder, root)))
        os.makedirs(path)
        for name, content in files.items():
            fd = os.open(os.path.join(path, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                for number, page in content.pages.items():
                    os.pwrite(fd, page, number * PAGE_BYTES)
                os.ftruncate(fd, content.size)
            finally:
                os.close(fd)
