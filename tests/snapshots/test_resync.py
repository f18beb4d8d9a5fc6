"""A replica that was away becomes equal again from the zones that changed, whatever happened.

Two replicas get the same changes; then one goes away (by a clean stop, a kill or a power cut,
perhaps with changes the other never got, or without some the other has), the other goes on: writes,
snapshots, deletion, folding, reverts, flushes. What the dirty logs say is compared and copied; live
volume and snapshots must then be those of the model. The copy may be interrupted and repeated.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from random import Random

import pytest

from snapshots.replica import Replica
from tests.snapshots.disk import VolatileDisk
from tests.snapshots.equalize import Sync
from tests.snapshots.model import RANGES, SIZE_BYTES, Content, Model, compare, kill, write

SEEDS = 48
GROUPS = 8


class Pair:
    """The model follows `a`; `b` is the member that goes away."""

    def __init__(self, directory: Path, random: Random, disk: VolatileDisk) -> None:
        self.random = random
        self.disk = disk
        self.model = Model(directory / "a")
        self.path_b = directory / "b"
        Replica.create(self.path_b, size_bytes=SIZE_BYTES, replica_uuid="b")
        self.b: Replica = Replica.open(self.path_b)
        self.config = 1
        self.out_at = 0
        self.together = True
        for replica in (self.model.replica, self.b):
            replica.shared = True

    @property
    def members(self) -> list[Replica]:
        return [self.model.replica, self.b] if self.together else [self.model.replica]

    def step(self) -> None:
        random, model = self.random, self.model
        kind = random.choices(
            ("write", "zero", "seal", "flush", "fold", "remove", "revert", "reopen"),
            (30, 14, 8, 16, 12, 5, 3, 3),
        )[0]
        first, count = random.choice(RANGES)
        start = random.randrange(count)
        length = random.randint(1, count - start)
        if kind == "write":
            numbers = [random.choice((0, random.randrange(1, 1 << 20))) for _ in range(length)]
            model.write(first + start, numbers)
            if self.together:
                write(self.b, first + start, numbers)
        elif kind == "zero":
            keep = random.random() < 0.3
            model.zero(first + start, length, keep_allocated=keep)
            if self.together:
                self.b.zero(first + start, length, keep_allocated=keep)
        elif kind == "seal" and len(model.snapshots) < 7:
            new_head = model.next_id
            model.seal()
            if self.together:
                self.b.seal(new_head, f"s{new_head}", "", {})
        elif kind == "flush":
            self.flush()
        elif kind == "fold":
            for replica in self.members:
                for _ in range(random.randrange(6)):
                    replica.maintain(random.choice((2, 64)))
        elif kind == "remove" and model.snapshots:
            layer_id = random.choice(sorted(model.snapshots))
            model.remove(layer_id)
            if self.together:
                self.b.remove(layer_id)
        elif kind == "revert" and model.snapshots:
            layer_id = random.choice(sorted(model.snapshots))
            new_head = model.next_id
            model.revert(layer_id)
            if self.together:
                self.b.revert(layer_id, new_head)
        elif kind == "reopen" and not self.together:
            if random.random() < 0.5:
                model.reopen()
            else:
                model.crash()
            model.replica.shared = True

    def flush(self) -> None:
        """Of all members; then each hears that it is stable."""
        members = self.members
        for replica in members:
            replica.flush()
        for replica in members:
            if self.random.random() < 0.8:
                replica.stable(replica.flushes_done, self.config)

    def go_away(self) -> None:
        """`b` is lost: with changes of its own that `a` never got, or without some of the last."""
        random = self.random
        for _ in range(random.randrange(3)):
            first, count = random.choice(RANGES)
            start = random.randrange(count)
            numbers = [random.randrange(1, 1 << 20)]
            if random.random() < 0.5:
                write(self.b, first + start, numbers)  # it never reached `a`
            else:
                self.model.write(first + start, numbers)  # it never reached `b`
        if random.random() < 0.3:
            self.b.flush()
        self.together = False
        self.config += 1
        self.out_at = self.config
        how = random.choice(("close", "kill", "cut"))
        if how == "close":
            self.b.close()
        else:
            kill(self.b)
        if how == "cut":
            self.disk.cut_power(random, below=str(self.path_b))

    def come_back(self) -> None:
        random = self.random
        self.b = Replica.open(self.path_b)
        self.b.shared = True
        for _ in range(random.randrange(4)):
            if random.random() < 0.5:
                self.b.maintain(2)
        while random.random() < 0.4:  # a copy that is interrupted
            sync = Sync(self.model.replica, self.b, self.out_at)
            sync.begin()
            for layer in sync.tree[: random.randrange(len(sync.tree) + 1)]:
                for region in sync.regions(layer["id"], layer["parent"]):
                    if random.random() < 0.6:
                        sync.copy_region(layer["id"], layer["parent"], region)
            kill(self.b)
            if random.random() < 0.5:
                self.disk.cut_power(random, below=str(self.path_b))
            self.step()
            self.b = Replica.open(self.path_b)
            self.b.shared = True
            assert not self.b.complete
        self.sync = Sync(self.model.replica, self.b, self.out_at).run()
        self.together = True
        self.config += 1
        self.check(self.b)

    def check(self, replica: Replica) -> None:
        contents: dict[int, Content] = {0: self.model.live, **self.model.snapshots}
        for layer_id, content in contents.items():
            compare(replica, content, layer_id)


def run(seed: int, patch: pytest.MonkeyPatch) -> None:
    directory = Path(tempfile.mkdtemp(prefix="blockd-test-"))
    try:
        random = Random(seed)
        pair = Pair(directory, random, VolatileDisk(directory, patch))
        for _ in range(random.randrange(1, 4)):
            for _ in range(random.randrange(30)):
                pair.step()
            pair.go_away()
            for _ in range(random.randrange(40)):
                pair.step()
            pair.come_back()
        pair.check(pair.model.replica)
        pair.b.close()
        pair.b = Replica.open(pair.path_b)
        pair.check(pair.b)
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_member_that_was_away_becomes_equal(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(group, SEEDS, GROUPS):
        with monkeypatch.context() as patch:
            try:
                run(seed, patch)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise


def test_what_was_copied_before_a_kill_is_durable_when_the_next_attempt_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt finds it equal, in the page cache, and does not write it again."""
    disk = VolatileDisk(tmp_path, monkeypatch)
    model = Model(tmp_path / "a")
    model.write(5, [1, 2, 3])
    model.seal()
    model.replica.flush()
    Replica.create(tmp_path / "b", size_bytes=SIZE_BYTES, replica_uuid="b")
    replica = Replica.open(tmp_path / "b")
    first = Sync(model.replica, replica, 0, fresh=True)
    first.begin()
    first.copy()
    kill(replica)
    replica = Replica.open(tmp_path / "b")
    second = Sync(model.replica, replica, 0).run()
    assert second.copied_blocks == 0
    kill(replica)
    disk.cut_power_keeping(lambda name, page: False)
    replica = Replica.open(tmp_path / "b")
    for layer_id, content in ((0, model.live), *model.snapshots.items()):
        compare(replica, content, layer_id)
    replica.close()
