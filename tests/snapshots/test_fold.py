"""Folding goes on under I/O: whatever happens between two of its steps, content stays right.

Each operation is tried after every step of folding a deleted snapshot, with and without a kill.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from protocol.checksum import block_checksum
from protocol.errors import NotFoundError, StateError
from snapshots.layer import block_offset
from snapshots.replica import Replica
from tests.snapshots.disk import VolatileDisk
from tests.snapshots.model import REGION, ZERO, Model, fill, kill, read_blocks, write

FIRST = REGION - 4


def overwrite(model: Model) -> None:
    model.write(FIRST, [31, 32, 33, 34, 35, 36])


def zero(model: Model) -> None:
    model.zero(FIRST + 1, 6)


def seal_and_overwrite(model: Model) -> None:
    model.seal()
    model.write(FIRST, [31, 32])


def revert(model: Model) -> None:
    model.revert(1)


def delete_the_parent_too(model: Model) -> None:
    model.remove(1)


OPERATIONS = [overwrite, zero, seal_and_overwrite, revert, delete_the_parent_too]


def being_folded(path: Path, steps: int) -> Model:
    """Snapshot 1, deleted snapshot 2 with blocks of its own, head 3; some steps of folding done."""
    model = Model(path)
    model.write(FIRST, [1, 2, 3, 4, 5, 6, 7, 8])
    model.seal()
    model.write(FIRST, [11, 12, 13, 14])
    model.zero(FIRST + 5, 2)
    model.seal()
    model.write(FIRST + 1, [22])
    model.reopen()
    model.remove(2)
    for _ in range(steps):
        model.replica.maintain(3)
    return model


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_between_any_two_steps_is_not_undone(
    operation: Callable[[Model], None], killed: bool, tmp_path: Path
) -> None:
    for steps in range(40):
        model = being_folded(tmp_path / str(steps), steps)
        model.check()
        done = 2 not in {layer.id for layer in model.replica.tree()}
        operation(model)
        model.check()
        if killed:
            model.crash()
            model.check()
        while model.replica.maintain(3):
            model.check()
        model.check()
        assert 2 not in {layer.id for layer in model.replica.tree()}
        model.reopen()
        model.check()
        model.replica.close()
        if done:
            assert steps > 8
            return
    raise AssertionError("folding does not end")


@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_between_any_two_steps_loses_nothing(
    seed: int, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    for steps in range(60):
        directory = tmp_path / str(steps)
        with monkeypatch.context() as patch:
            disk = VolatileDisk(directory, patch)
            model = being_folded(directory, 0)
            model.write(FIRST - 40, list(range(1, 30)))
            model.replica.flush()
            if seed % 2:
                write(model.replica, FIRST + 3, [99])  # over 14, and nothing asks for a flush
            for _ in range(steps):
                model.replica.maintain(budget)
            done = 2 not in {layer.id for layer in model.replica.tree()}
            kill(model.replica)
            disk.cut_power(random)
            model.replica = Replica.open(directory)
            if seed % 2:
                (found,) = read_blocks(model.replica, FIRST + 3, 1)
                assert set(memoryview(found).cast("I")) <= {14, 99}
                model.write(FIRST + 3, [99])
            model.check()
            while model.replica.maintain(budget):
                model.check()
            assert 2 not in {layer.id for layer in model.replica.tree()}
            model.replica.close()
        if done:
            return
    raise AssertionError("folding does not end")


def test_zeros_that_came_by_folding_stay_under_a_write_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = VolatileDisk(tmp_path, monkeypatch)
    model = being_folded(tmp_path / "replica", 0)
    while model.replica.maintain():
        pass
    model.replica.flush()
    write(model.replica, FIRST + 5, [77])
    kill(model.replica)  # the map entry of the write survives, its data does not
    map_page = 1 + (FIRST + 5) // REGION * (REGION + 1)
    disk.cut_power_keeping(lambda name, page: page == map_page)
    replica = Replica.open(tmp_path / "replica")
    assert read_blocks(replica, FIRST + 5, 1) == [ZERO], "and not what snapshot 1 has there"
    replica.close()


def test_without_an_inline_flush_folding_waits_for_the_callers(tmp_path: Path) -> None:
    model = being_folded(tmp_path / "replica", 0)
    replica = model.replica
    turns = 0
    while replica.maintain(3, inline_flush=False):
        turns += 1
        assert turns < 100
        if replica.flush_wanted:
            done = replica.flushes_done
            assert replica.maintain(3, inline_flush=False)
            assert replica.flushes_done == done
            job = replica.flush_begin()
            job.run()
            replica.flush_end(job)
        model.check()
    assert [layer.id for layer in replica.tree()] == [1, 3]


def test_folding_is_held_while_a_copy_is_made(tmp_path: Path) -> None:
    model = being_folded(tmp_path / "replica", 0)
    model.replica.hold_folding = True
    while model.replica.maintain():
        pass
    assert 2 in {layer.id for layer in model.replica.tree()}


def test_a_logical_layer_is_the_same_after_every_step_of_folding(tmp_path: Path) -> None:
    model = being_folded(tmp_path / "replica", 0)
    replica = model.replica
    first, target = FIRST - FIRST % REGION, memoryview(bytearray(REGION * 4100))
    seen = set()
    for _ in range(40):
        used = replica.layer_read(3, 1, first, REGION, target)
        digests = replica.layer_digests(3, 1, first, REGION)
        seen.add((bytes(target[:used]), digests, replica.layer_check(3, 1, 0, 4)))
        replica.maintain(3)
    assert 2 not in {layer.id for layer in replica.tree()}
    assert len(seen) == 1
    entries = target[: 4 * REGION].cast("I")
    assert [entry > 3 for entry in entries[FIRST % REGION :]] == [True, True, True, True]


def test_a_layer_that_is_not_removed_separates_logical_layers(tmp_path: Path) -> None:
    model = being_folded(tmp_path / "replica", 0)
    with pytest.raises(StateError, match="lies between"):
        model.replica.layer_regions(3, 0)
    with pytest.raises(NotFoundError):
        model.replica.layer_regions(1, 3)
    assert model.replica.layer_regions(1, 0) == [(0, 2)]


def test_a_damaged_block_stays_until_it_is_mended_and_folding_ends(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.write(FIRST, [1, 2, 3])
    model.seal()
    model.replica.flush()
    with open(model.path / "layers" / "1.layer", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"X", block_offset(FIRST + 1) + 100)
    model.remove(1)
    steps = 0
    while model.replica.maintain():
        steps += 1
        assert steps < 20, "folding goes round and round"
    assert [layer.id for layer in model.replica.tree()] == [1, 2]
    assert read_blocks(model.replica, FIRST, 1) + read_blocks(model.replica, FIRST + 2, 1) == [
        fill(1),
        fill(3),
    ]
    with pytest.raises(AssertionError):
        read_blocks(model.replica, FIRST + 1, 1)
    good = memoryview(fill(2))
    entries = memoryview(array("I", [block_checksum(good)]))
    assert model.replica.mend(0, FIRST + 1, entries, good) == 1
    while model.replica.maintain():
        pass
    assert [layer.id for layer in model.replica.tree()] == [2]
    model.check()
