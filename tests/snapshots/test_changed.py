"""What changed between two snapshots, or since one.

Proves for random histories, with deletion, folding and revert, that every block whose content
differs is named, and along a line of snapshots no block that was not written in between.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.errors import NotFoundError
from protocol.units import BLOCKS_PER_REGION
from snapshots.replica import Replica
from tests.snapshots.model import BLOCK_COUNT, BLOCKS, Model, grown


def flagged(replica: Replica, base_id: int, layer_id: int = 0) -> set[int]:
    """The blocks that may differ; checks that the runs cover the volume exactly."""
    found: set[int] = set()
    block = 0
    while block < BLOCK_COUNT:
        for count, differs in replica.differences(block, BLOCK_COUNT - block, base_id, layer_id, 3):
            assert count > 0
            if differs:
                found.update(range(block, block + count))
            block += count
    assert block == BLOCK_COUNT
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_block_that_differs_is_named(tmp_path: Path, seed: int) -> None:
    model = grown(tmp_path / "r", seed)
    views = {0: model.live, **model.snapshots}
    for base_id, base in model.snapshots.items():
        for layer_id, content in views.items():
            found = flagged(model.replica, base_id, layer_id)
            differ = {block for block in BLOCKS if base.get(block, 0) != content.get(block, 0)}
            assert differ <= found <= set(BLOCKS)
            if base_id == layer_id:
                assert not found
    model.replica.close()


def test_only_what_was_written_in_between_is_named(tmp_path: Path) -> None:
    model = Model(tmp_path / "r")
    model.write(0, [1, 2, 3, 4])
    first = model.seal()
    model.write(1, [20])
    model.zero(2, 1)
    second = model.seal()
    model.write(1, [21])
    model.write(BLOCKS_PER_REGION, [5])
    replica = model.replica
    assert flagged(replica, first, second) == {1, 2}
    assert flagged(replica, second, first) == {1, 2}
    assert flagged(replica, second) == {1, BLOCKS_PER_REGION}
    assert flagged(replica, first) == {1, 2, BLOCKS_PER_REGION}
    model.remove(second)
    while replica.maintain():
        replica.flush()
    assert flagged(replica, first) == {1, 2, BLOCKS_PER_REGION}
    with pytest.raises(NotFoundError):
        replica.differences(0, 1, second)
    replica.close()
