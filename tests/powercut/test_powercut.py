"""Proves that a power cut at any moment leaves a replica that opens, holds what was flushed, and
knows where it may differ from other members: the short form of `make powercut`."""

from __future__ import annotations

import pytest

from tests.powercut.replay import Replay


@pytest.mark.parametrize(("kind", "seed"), [("life", 5), ("rebuild", 3)])
def test_every_sync_boundary_of_a_history_survives_power_cuts(kind: str, seed: int) -> None:
    replay = Replay(kind, seed, 2, prefixes=False, steps=60)
    replay.run()
    assert not replay.violations, replay.violations[0]
    assert replay.boundaries >= 20


@pytest.mark.parametrize("file", ["dirty.log", "/layers"])
def test_a_sync_that_does_nothing_is_found(file: str) -> None:
    replay = Replay("life", 1, 2, prefixes=False, lying=file)
    replay.run()
    assert replay.violations
