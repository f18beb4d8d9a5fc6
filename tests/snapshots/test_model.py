"""Random histories of a replica and of a plain model end in the same content.

Writes, zeroing, snapshots, deletion, revert, folding, flushes, clean and unclean restarts and
copies into a second replica are mixed at random; after each step the live volume, every snapshot
and the extents must be those of the model.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snapshots.replica import Replica
from tests.snapshots.equalize import Sync
from tests.snapshots.model import BLOCK_COUNT, RANGES, SIZE_BYTES, Model, compare

ranges = st.sampled_from(RANGES).flatmap(
    lambda place: st.integers(0, place[1] - 1).flatmap(
        lambda start: st.tuples(st.just(place[0] + start), st.integers(1, place[1] - start))
    )
)
numbers = st.lists(st.sampled_from([0, 1, 2, 3, 1 << 24]), min_size=12, max_size=12)


class Histories(RuleBasedStateMachine):
    """One replica, one model."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="blockd-test-"))
        self.model = Model(self.directory / "a")

    def teardown(self) -> None:
        self.model.replica.abandon()
        shutil.rmtree(self.directory)

    @rule(place=ranges, values=numbers)
    def write(self, place: tuple[int, int], values: list[int]) -> None:
        self.model.write(place[0], values[: place[1]])

    @rule(place=ranges, keep=st.booleans())
    def zero(self, place: tuple[int, int], keep: bool) -> None:
        self.model.zero(*place, keep_allocated=keep)

    @rule(more=st.integers(1, 9000))
    def grow(self, more: int) -> None:
        self.model.grow(more)

    @rule()
    def zero_everything(self) -> None:
        self.model.zero(0, BLOCK_COUNT)

    @precondition(lambda self: len(self.model.snapshots) < 8)
    @rule()
    def seal(self) -> None:
        self.model.seal()

    @precondition(lambda self: self.model.snapshots)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.model.remove(data.draw(st.sampled_from(sorted(self.model.snapshots))))

    @precondition(lambda self: self.model.snapshots)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        self.model.revert(data.draw(st.sampled_from(sorted(self.model.snapshots))))

    @rule()
    def flush(self) -> None:
        self.model.replica.flush()

    @rule(budget=st.sampled_from([1, 3, 256]), times=st.integers(1, 12))
    def maintain(self, budget: int, times: int) -> None:
        for _ in range(times):
            self.model.replica.maintain(budget)

    @rule()
    def maintain_to_the_end(self) -> None:
        for _ in range(1000):
            if not self.model.replica.maintain():
                break
        else:
            raise AssertionError("maintenance does not come to an end")
        children: dict[int, int] = {}
        for layer in self.model.replica.tree():
            children[layer.parent] = children.get(layer.parent, 0) + 1
        for layer in self.model.replica.tree():
            assert not layer.removed or children.get(layer.id, 0) > 1

    @rule()
    def reopen(self) -> None:
        self.model.reopen()
        assert self.model.replica.recovered_zones == []

    @rule()
    def crash(self) -> None:
        self.model.crash()

    @rule()
    def copy(self) -> None:
        copy_and_compare(self.model, self.directory / "b")

    @invariant()
    def content_is_right(self) -> None:
        self.model.check()


def copy_and_compare(model: Model, path: Path) -> None:
    """A second replica filled region by region holds the same volume and snapshots."""
    shutil.rmtree(path, ignore_errors=True)
    Replica.create(path, size_bytes=random.choice((1 << 20, SIZE_BYTES)), replica_uuid="other")
    target = Replica.open(path)
    Sync(model.replica, target, 0).run()
    compare(target, model.live)
    for layer_id, content in model.snapshots.items():
        compare(target, content, layer_id)
    target.close()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
