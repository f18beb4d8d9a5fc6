"""After a power cut each block is what the last flush made durable, or something written since.

Random histories run on a disk with a volatile cache (tests/snapshots/disk.py) that loses any part
of what was not synced, page by page or sector by sector. Flushed snapshots are unharmed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from random import Random

import pytest

from protocol.units import BLOCK_BYTES
from snapshots.replica import Replica
from tests.snapshots.disk import SECTOR_BYTES, VolatileDisk
from tests.snapshots.model import REGION, Model, kill, read_blocks

SEEDS = 32
STEPS = 60
FIRST, COUNT = REGION - 2, 5  # few blocks, so that many operations meet on each
BLOCKS = range(FIRST, FIRST + COUNT)


class History:
    """One random history. `allowed[b]` holds every number block b may have after a power cut."""

    def __init__(self, directory: Path, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random
        self.disk = VolatileDisk(directory, monkeypatch)
        self.model = Model(directory / "replica")
        self.allowed: dict[int, set[int]] = {}
        self.settle()

    def settle(self) -> None:
        """Everything is durable."""
        self.allowed = {block: {self.model.live.get(block, 0)} for block in BLOCKS}
        self.kept = dict(self.model.snapshots)

    def note(self) -> None:
        for block in BLOCKS:
            self.allowed[block].add(self.model.live.get(block, 0))

    def step(self) -> None:
        model, random = self.model, self.random
        first, start = FIRST, random.randrange(COUNT)
        length = random.randint(1, COUNT - start)
        kind = random.choices(
            ("write", "zero", "seal", "flush", "maintain", "remove", "revert", "cut"),
            (30, 15, 5, 14, 8, 3, 2, 10),
        )[0]
        if kind == "write":
            numbers = [random.choice((0, random.randrange(1, 1 << 20))) for _ in range(length)]
            model.write(first + start, numbers)
        elif kind == "zero":
            model.zero(first + start, length, keep_allocated=random.random() < 0.3)
        elif kind == "seal" and len(model.snapshots) < 6:
            model.seal()
        elif kind == "flush":
            model.replica.flush()
            self.settle()
        elif kind == "maintain":
            self.maintain()
        elif kind == "remove" and self.kept:
            # Durable on return, and a pending seal is flushed with it.
            pending = model.replica.metadata_pending
            layer_id = random.choice(sorted(self.kept))
            model.remove(layer_id)
            del self.kept[layer_id]
            if pending:
                self.settle()
        elif kind == "revert" and self.kept:
            model.revert(random.choice(sorted(self.kept)))
            self.settle()
        elif kind == "cut":
            self.cut()
        self.note()

    def maintain(self) -> None:
        """The flushes inside are real ones: what they cover is durable."""
        replica = self.model.replica
        for _ in range(self.random.randrange(1, 6)):
            done = replica.flushes_done
            replica.maintain(self.random.choice((2, 64)))
            if replica.flushes_done != done:
                self.settle()

    def cut(self) -> None:
        model = self.model
        kill(model.replica)
        self.disk.cut_power(self.random)
        model.replica = Replica.open(model.path)
        live = {}
        for block, content in zip(BLOCKS, read_blocks(model.replica, FIRST, COUNT), strict=True):
            for sector in range(0, BLOCK_BYTES, SECTOR_BYTES):
                number = int.from_bytes(content[sector : sector + 4], "little")
                assert number in self.allowed[block], (block, number, self.allowed[block])
            whole = int.from_bytes(content[:4], "little")
            live[block] = whole
            if content != whole.to_bytes(4, "little") * (BLOCK_BYTES // 4):  # torn: write it
                model.write(block, [whole])
        model.live = {block: number for block, number in live.items() if number}
        model.snapshots = dict(self.kept)
        assert {layer.id for layer in model.replica.tree() if layer.name and not layer.removed} == (
            set(self.kept)
        )
        model.check()
        model.replica.flush()
        self.settle()


@pytest.mark.parametrize("group", range(8))
def test_blocks_are_old_or_new_after_power_cuts(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(group * SEEDS // 8, (group + 1) * SEEDS // 8):
        with monkeypatch.context() as patch:
            run_history(seed, patch)


def run_history(seed: int, patch: pytest.MonkeyPatch) -> None:
    directory = Path(tempfile.mkdtemp(prefix="blockd-test-"))
    try:
        history = History(directory, Random(seed), patch)
        for number in range(STEPS):
            try:
                history.step()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, step {number}: {error}") from error
        history.cut()
        history.model.replica.close()
    finally:
        shutil.rmtree(directory)
