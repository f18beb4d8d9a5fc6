"""Proves that the usage of snapshots is what one sees in them, and what their deletion frees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from protocol.units import BLOCK_BYTES
from snapshots.masks import masks
from snapshots.replica import Replica
from snapshots.usage import Usage, usage
from tests.snapshots.model import BLOCK_COUNT, REGION, ZONE, Model, grown


def whole(replica: Replica, steps: bool = False) -> Usage:
    """The usage of all regions, in one answer or in as many as there are regions."""
    total: Usage = {}
    region: int | None = 0
    while region is not None:
        found, region = usage(replica, region, lambda: steps)
        for layer_id, numbers in found.items():
            before = total.get(layer_id, [0, 0])
            total[layer_id] = [before[0] + numbers[0], before[1] + numbers[1]]
    return total


def stored(replica: Replica) -> int:
    """Bytes of data in all layers, by their maps."""
    layers = [replica.layer_file(info.id) for info in replica.metadata.layers]
    return BLOCK_BYTES * sum(
        masks(layer.map_block(region))[1].bit_count() // 8
        for layer in layers
        for region in layer.regions()
    )


def tidy(replica: Replica) -> None:
    replica.flush()
    while replica.maintain():
        pass


@pytest.mark.parametrize("seed", range(4))
def test_data_is_what_one_sees_whatever_is_folded(seed: int, tmp_path: Path) -> None:
    model = grown(tmp_path / "replica", seed)
    for _ in range(2):
        found = whole(model.replica)
        head = model.replica.metadata.head_id
        expected = {**model.snapshots, head: model.live}
        for layer_id, content in expected.items():
            blocks = sum(
                count for count, data in model.replica.extents(0, BLOCK_COUNT, layer_id) if data
            )
            assert found[layer_id][0] == blocks * BLOCK_BYTES
            assert found[layer_id][0] >= BLOCK_BYTES * sum(n != 0 for n in content.values())
        assert whole(model.replica, steps=True) == found
        tidy(model.replica)


@pytest.mark.parametrize("seed", range(4))
def test_deletion_gives_back_what_was_said(seed: int, tmp_path: Path) -> None:
    model = grown(tmp_path / "replica", seed, steps=90)
    tidy(model.replica)
    found = whole(model.replica)
    before = stored(model.replica)
    model.replica.close()
    checked = 0
    for layer_id in model.snapshots:
        copy = tmp_path / f"copy{layer_id}"
        subprocess.run(["cp", "-a", "--sparse=always", model.path, copy], check=True)
        replica = Replica.open(copy)
        replica.remove(layer_id)
        tidy(replica)
        freed = before - stored(replica)
        if any(info.removed for info in model.replica.metadata.layers):
            assert freed >= found[layer_id][1]  # one that is deleted already may go, too
        else:
            assert freed == found[layer_id][1]
        checked += found[layer_id][1] > 0
        replica.close()
    model.replica = Replica.open(model.path)
    assert checked or not model.snapshots


def test_blocks_written_again_are_the_snapshots_own(tmp_path: Path) -> None:
    model = Model(tmp_path / "replica")
    model.write(0, [1, 2, 3])
    model.write(ZONE, [4])
    first = model.seal()
    assert whole(model.replica)[first] == [4 * BLOCK_BYTES, 0]
    model.write(1, [5])
    model.zero(ZONE, 1)
    model.write(REGION, [6])
    found = whole(model.replica)
    assert found[first] == [4 * BLOCK_BYTES, 2 * BLOCK_BYTES]
    assert found[model.replica.metadata.head_id][0] == 4 * BLOCK_BYTES
    second = model.seal()
    model.revert(first)
    found = whole(model.replica)
    assert found[first][1] == 0, "two stand on it: it stays until one is left"
    assert found[second] == [4 * BLOCK_BYTES, 2 * BLOCK_BYTES], "nothing stands on it"
