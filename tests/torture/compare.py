"""Replica directories next to each other, when no daemon runs: equal, and what the ledger allows.

Each is opened as its daemon would open it. The live volume and every snapshot are read in full
from each, with every checksum; then all maps are walked, so that what no read reaches is looked at
as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from protocol.checksum import ABSENT, ZEROS, block_checksum
from protocol.errors import BlockdError
from protocol.units import BLOCKS_PER_REGION
from snapshots.replica import Replica
from tests.snapshots.model import read_blocks
from tests.torture.ledger import BLOCK_BYTES, Ledger, Wrong

Contents = dict[str, dict[int, bytes]]
"""name of a snapshot ("": the volume) to its blocks that are not zeros"""

ZERO = bytes(BLOCK_BYTES)


def compare(paths: Sequence[Path], ledger: Ledger) -> None:
    """Raise Wrong if they differ, or hold something they may not hold."""
    contents = [read_directory(path) for path in paths]
    first = contents[0]
    for path, other in zip(paths[1:], contents[1:], strict=True):
        if other.keys() != first.keys():
            raise Wrong(f"{paths[0]} has {sorted(first)}, {path} has {sorted(other)}")
        for name, blocks in other.items():
            for block in {*blocks, *first[name]}:
                if blocks.get(block) != first[name].get(block):
                    raise Wrong(f"block {block} of {name or 'the volume'} differs in {path}")
    known = set(ledger.blocks)
    for name, blocks in first.items():
        stray = set(blocks) - known
        if stray:
            raise Wrong(f"blocks {sorted(stray)[:8]} of {name or 'the volume'} were never written")
    if set(first) - {""} != set(ledger.snapshots):
        raise Wrong(f"snapshots {sorted(set(first) - {''})}, not {sorted(ledger.snapshots)}")
    for block in ledger.blocks:
        ledger.settle(block, first[""].get(block, ZERO))
        for name in ledger.snapshots:
            ledger.settle_snapshot(name, block, first[name].get(block, ZERO))


def read_directory(path: Path) -> Contents:
    """Everything a replica holds; Wrong if anything in it does not fit together."""
    try:
        replica = Replica.open(path)
    except BlockdError as error:
        raise Wrong(f"{path} does not open: {error}") from error
    try:
        if not replica.clean_start:
            raise Wrong(f"{path} was not closed cleanly")
        layers = {layer.name: layer.id for layer in replica.tree() if layer.name}
        removed = {layer.name for layer in replica.tree() if layer.removed}
        wanted = {"": 0, **{name: i for name, i in layers.items() if name not in removed}}
        contents = {name: _read(replica, layer_id) for name, layer_id in wanted.items()}
        _check_maps(replica)
    except (BlockdError, AssertionError) as error:
        raise Wrong(f"{path} is damaged: {error}") from error
    finally:
        replica.close()
    return contents


def _read(replica: Replica, layer_id: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for first in range(0, replica.block_count, BLOCKS_PER_REGION):
        count = min(BLOCKS_PER_REGION, replica.block_count - first)
        for number, block in enumerate(read_blocks(replica, first, count, layer_id)):
            if block != ZERO:
                found[first + number] = block
    return found


def _check_maps(replica: Replica) -> None:
    """Every entry of every layer fits its data."""
    for info in replica.tree():
        layer = replica.layer_file(info.id)
        for region in layer.regions():
            entries = memoryview(layer.map_block(region)).cast("I")
            for number, entry in enumerate(entries):
                block = region * BLOCKS_PER_REGION + number
                if entry in (ABSENT, ZEROS):
                    continue
                content = memoryview(bytearray(BLOCK_BYTES))
                layer.read(block, 1, content)
                if block_checksum(content) != entry:
                    raise Wrong(f"block {block} of layer {info.id} does not fit its checksum")
