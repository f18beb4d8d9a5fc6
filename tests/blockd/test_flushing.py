"""Flushes share work and still cover exactly what was applied before they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockd.daemons.flushing import Flushing
from protocol.errors import BlockdError
from protocol.units import BLOCKS_PER_ZONE
from tests.snapshots.model import Model


class ManualLoop:
    """Threads that run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any, Any], None]]] = []

    def in_thread(self, work: Callable[[], Any], done: Callable[[Any, Any], None]) -> None:
        self.jobs.append((work, done))

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """No sign of life is needed here."""

    def run(self) -> None:
        work, done = self.jobs.pop(0)
        done(work(), None)


class Harness:
    def __init__(self, path: Path) -> None:
        self.model = Model(path / "replica")
        self.replica = self.model.replica
        self.replica.shared = True
        self.loop = ManualLoop()
        self.flushing = Flushing(self.loop, self.replica)  # type: ignore[arg-type]
        self.answers: dict[int, BlockdError | None] = {}

    def flush(self, sequence: int) -> None:
        self.flushing.flush(lambda error: self.answers.__setitem__(sequence, error), sequence)

    def dirty_after_stable(self, sequence: int) -> list[int]:
        """The zones that stay dirty when that flush is stable."""
        self.flushing.stable(sequence, 1)
        while self.replica.maintain():
            pass
        return self.replica.dirty.dirty_zones()


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def test_flushes_asked_for_while_one_runs_are_done_together(harness: Harness) -> None:
    for sequence in range(1, 6):
        harness.model.write(sequence, [sequence])
        harness.flush(sequence)
    harness.loop.run()
    assert harness.answers == {1: None}
    harness.loop.run()
    assert harness.answers == dict.fromkeys(range(1, 6))
    assert not harness.loop.jobs


def test_a_write_between_two_flushes_that_are_done_together_belongs_to_the_later_one(
    harness: Harness,
) -> None:
    harness.flush(1)
    harness.model.write(0, [1])
    harness.flush(2)
    harness.model.write(BLOCKS_PER_ZONE, [1])
    harness.flush(3)
    harness.loop.run()
    harness.loop.run()
    assert harness.answers == dict.fromkeys((1, 2, 3))
    assert harness.dirty_after_stable(1) == [0, 1]
    assert harness.dirty_after_stable(2) == [1]
    assert harness.dirty_after_stable(3) == []


def test_a_flush_that_was_never_answered_makes_nothing_stable(harness: Harness) -> None:
    harness.model.write(0, [1])
    harness.flush(1)
    assert harness.dirty_after_stable(1) == [0]


def test_sequences_of_an_older_owner_mean_nothing(harness: Harness) -> None:
    harness.model.write(0, [1])
    harness.flush(9)
    harness.loop.run()
    harness.flushing.new_owner()
    assert harness.dirty_after_stable(9) == [0]


def test_a_failed_flush_fails_for_all_it_was_done_for(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "no")

    harness.flush(1)
    harness.model.write(0, [1])
    harness.flush(2)
    harness.flush(3)
    harness.loop.run()
    monkeypatch.setattr("os.fdatasync", broken)
    work, done = harness.loop.jobs.pop(0)
    work()
    done(None, None)
    assert harness.answers[1] is None
    assert harness.answers[2] is not None
    assert harness.answers[3] is not None
    harness.flush(4)
    assert harness.answers[4] is not None  # never believed again
