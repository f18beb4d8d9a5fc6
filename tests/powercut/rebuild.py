"""A scripted rebuild: the recorded replica was away and is made equal to another one.

Both live through the same changes; the recorded one is lost with some that the other never got and
without some the other has; the other goes on alone, with snapshots, deleted ones, reverts. Then the
recorded one takes over the tree (BEGIN_SYNC), is compared and gets what differs (LAYER_WRITE) with
writes to both and flushes in between, perhaps its process is killed and it begins again, and is
readable at the end (END_SYNC). The other one is not recorded: it has power all the time.

Whenever the power went, making the replica equal again, from what both say of themselves, must give
what the other one has.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from protocol.errors import StateError
from snapshots.logical import DIGEST_BYTES
from snapshots.replica import Replica
from tests.powercut.expected import NEVER
from tests.powercut.found import Found, read
from tests.powercut.history import History
from tests.snapshots.equalize import Sync
from tests.snapshots.model import RANGES, REGION, SIZE_BYTES, kill

TOGETHER_STEPS, ALONE_STEPS, AFTER_STEPS = 25, 20, 8
ATTEMPTS_MAX = 8  # as in replication/rebuild.py
TOGETHER, ALONE, AGAIN = 1, 2, 3  # member configurations


class RebuildHistory(History):
    """See the module text. `begins` and `ends` are the time of the rebuild, `lost` of the loss."""

    def __init__(self, directory: Path, random: Random) -> None:
        super().__init__(directory, random)
        path = directory / "other"
        Replica.create(path, size_bytes=SIZE_BYTES, replica_uuid="other", head_id=1)
        self.other = Replica.open(path)
        self.other.shared = True
        self.lost = self.begins = self.ends = NEVER
        self.stamps: list[int] = []  # of the other, by zone, when both are equal
        self.before = self.expected  # until the rebuild begins
        self.final: Found | None = None  # of the other, at the end of all

    def run(self, steps: int) -> None:
        """All of it, however many steps that takes."""
        for _ in range(TOGETHER_STEPS):
            self.both()
        self.lose()
        for _ in range(ALONE_STEPS):
            self.alone()
        self.rebuild()
        for _ in range(AFTER_STEPS):
            if self.random.random() < 0.7:
                self.change((self.replica, self.other))
            else:
                self.flush_both(stable=False)
        self.final = read(self.other)

    def both(self) -> None:
        """A step of two members in sync."""
        kind = self.random.choices(("change", "flush", "seal", "maintain"), (10, 4, 2, 3))[0]
        self.steps.append((self.now, f"both {kind}"))
        if kind == "change":
            self.change((self.replica, self.other))
        elif kind == "flush":
            self.flush_both(stable=self.random.random() < 0.8)
        elif kind == "seal":
            head = self.next_layer
            self.seal()
            if self.next_layer != head:
                self.other.seal(head, f"s{self.other.metadata.head_id}", "", {})
        else:
            for replica in (self.replica, self.other):
                for _ in range(4):
                    replica.maintain(64)

    def flush_both(self, *, stable: bool, config: int = TOGETHER) -> None:
        jobs = [(replica, replica.flush_begin()) for replica in (self.replica, self.other)]
        for replica, job in jobs:
            job.run()
            replica.flush_end(job)
        if stable:
            for replica, job in jobs:
                replica.stable(job.sequence, config)
            self._jobs[jobs[0][1]].stable = self.now

    def lose(self) -> None:
        """Some changes only one of them got, none of which was answered."""
        self.steps.append((self.now, "lost"))
        for _ in range(self.random.randrange(3)):
            self.change((self.replica,))
        for _ in range(self.random.randrange(3)):
            self.change((self.other,))
        self.other.note_config(ALONE)
        if self.random.random() < 0.5:
            self.do(self.random.choice(("restart", "cut", "maintain_alone")))
        self.lost = self.now

    def maintain_alone(self) -> None:
        """It does not know yet that it is alone."""
        for _ in range(3):
            self.replica.maintain(64)

    def alone(self) -> None:
        """A step of the member that is left."""
        other, random = self.other, self.random
        kinds = ("change", "flush", "seal", "remove", "revert", "maintain")
        kind = random.choices(kinds, (30, 8, 5, 3, 2, 6))[0]
        present = [info.id for info in other.tree() if info.name and not info.removed]
        if kind == "change":
            self.change((other,))
        elif kind == "flush":
            job = other.flush_begin()
            job.run()
            other.flush_end(job)
            other.stable(job.sequence, ALONE)
        elif kind == "seal" and len(present) < 6:
            other.seal(self.next_layer, f"s{other.metadata.head_id}", "", {})
            self.next_layer += 1
        elif kind == "remove" and present:
            other.remove(random.choice(present))
        elif kind == "revert" and present:
            other.revert(random.choice(present), self.next_layer)
            self.next_layer += 1
        elif kind == "maintain":
            for _ in range(random.randrange(8)):
                other.maintain(random.choice((3, 64)))

    def rebuild(self) -> None:
        """As replication/rebuild.py does it."""
        self.begins = self.now
        self.other.hold_folding = True
        attempts = self.random.choice((1, 1, 2))
        for attempt in range(attempts):
            self.steps.append((self.now, "begin_sync"))
            sync = begin(self.other, self.replica, ALONE)
            regions = [
                (layer["id"], layer["parent"], region)
                for layer in sync.tree
                for region in sync.regions(layer["id"], layer["parent"])
            ]
            for number, place in enumerate(regions):
                sync.copy_region(*place)
                if self.random.random() < 0.4:
                    self.change((self.replica, self.other))
                if self.random.random() < 0.2:
                    self.flush_both(stable=True, config=ALONE)
                if attempt < attempts - 1 and number > len(regions) // 2:
                    self.do(self.random.choice(("restart", "cut_in_sync")))
                    break
        self.steps.append((self.now, "end_sync"))
        for _ in range(ATTEMPTS_MAX):
            try:
                sync.end()
                break
            except AssertionError:  # a trim of zeros is recorded here and not there: once more
                sync = begin(self.other, self.replica, ALONE)
                sync.copy()
        self.ends = self.now
        self.other.hold_folding = False
        for replica in (self.replica, self.other):
            replica.note_config(AGAIN)
        found = read(self.other)
        self.stamps = [
            self.other.dirty.stamp(zone, AGAIN) for zone in range(len(self.other.dirty.zones))
        ]
        self.before = self.expected
        self.expected = self.before.rebased(self.ends, found.live, found.snapshots)

    def cut_in_sync(self) -> None:
        """A power cut in the middle of it."""
        kill(self.replica)
        self.cut_and_open(self.now)

    def since(self, time: int) -> int:
        """The configuration from which on the replica may miss something after a cut."""
        return ALONE if time < self.ends else AGAIN


class QuickSync(Sync):
    """Looks at the blocks that a history can have touched, and at no others."""

    def copy_region(self, layer_id: int, parent_id: int, region: int) -> None:
        for first, count in pieces_of(region):
            theirs = self.source.layer_digests(layer_id, parent_id, first, count)
            ours = self.target.layer_digests(layer_id, parent_id, first, count)
            for number in range(count):
                at = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
                if theirs[at] != ours[at]:
                    self.copy_blocks(layer_id, parent_id, first + number, 1)


def pieces_of(region: int) -> list[tuple[int, int]]:
    """The parts of RANGES in a region."""
    begin, end = region * REGION, (region + 1) * REGION
    cut = [(max(first, begin), min(first + count, end)) for first, count in RANGES]
    return [(first, stop - first) for first, stop in cut if first < stop]


def begin(source: Replica, target: Replica, since: int) -> Sync:
    """A rebuild that keeps what is there, if that can be."""
    sync = QuickSync(source, target, since)
    try:
        sync.begin()
    except StateError:
        sync = QuickSync(source, target, since, fresh=True)
        sync.begin()
    return sync
