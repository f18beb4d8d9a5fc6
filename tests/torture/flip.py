"""One bit of one block of one member turns over on its disk.

Done only while all members are in sync and nobody writes, so that the other members hold the block.
Whoever reads the block must get what was written, and the volume daemon must count the checksum
that did not fit once this member was asked. If the member has not been repaired after that, the
block is written again (a block of the head) or the bit is turned back (a block of a snapshot).
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from snapshots.layer import block_offset, layer_path
from snapshots.metadata import MetadataFile
from tests.blockd.nbd_client import NbdClient
from tests.torture.ground import Ground
from tests.torture.ledger import BLOCK_BYTES, Ledger, Wrong

READS_MAX = 600  # reads are spread over the members; one of a few is served by each
REPAIR_SECONDS = 0.3  # how long the volume daemon gets to repair by itself


def flip_a_bit(ground: Ground, ledger: Ledger, source: random.Random) -> str:
    """Do it and see that it is noticed; what was done."""
    client = NbdClient(ground.nbd())
    client.flush()  # now replica.json says what the tree is
    number = source.randrange(len(ground.replicas))
    blocks = list(ledger.blocks)
    source.shuffle(blocks)
    try:
        for block in blocks:
            found = _place(ground.path(number), block)
            if found is not None:
                path, is_head = found
                return _turn(ground, ledger, source, client, path, block, number, is_head)
    finally:
        client.close()
    return "nowhere: there is no data"


def _place(directory: Path, block: int) -> tuple[str, bool] | None:
    """The layer file that holds a block of the volume, and whether it is the head."""
    metadata = MetadataFile(str(directory)).read()
    with open(directory / "index", "rb") as index:
        index.seek(block)
        slot = index.read(1)[0]
    for layer in metadata.layers:
        if layer.slot == slot:
            return layer_path(str(directory), layer.id), layer.id == metadata.head_id
    return None


def _turn(
    ground: Ground,
    ledger: Ledger,
    source: random.Random,
    client: NbdClient,
    path: str,
    block: int,
    number: int,
    is_head: bool,
) -> str:
    at = block_offset(block) + source.randrange(BLOCK_BYTES)
    bit = 1 << source.randrange(8)
    errors = int(ground.status()["counters"]["checksum_errors"])
    _flip(path, at, bit)
    told = f"replica {number}, block {block} of the {'head' if is_head else 'sealed layer'}"
    for _ in range(READS_MAX):
        since = ledger.now()
        ledger.check_read(block, client.read(block * BLOCK_BYTES, BLOCK_BYTES), since)
        if int(ground.status()["counters"]["checksum_errors"]) > errors:
            break
    else:
        raise Wrong(f"{told}: nobody noticed in {READS_MAX} reads")
    time.sleep(REPAIR_SECONDS)
    good = client.read(block * BLOCK_BYTES, BLOCK_BYTES)
    ledger.check_read(block, good, ledger.now())
    if _place(ground.path(number), block) != (path, is_head) or _read(path, block) == good:
        return f"{told}, repaired"
    if is_head:
        client.write(block * BLOCK_BYTES, good)
        if _read(path, block) != good:
            raise Wrong(f"{told}: writing it again did not repair it")
        return f"{told}, written again"
    _flip(path, at, bit)
    return f"{told}, turned back"


def _read(path: str, block: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), BLOCK_BYTES, block_offset(block))


def _flip(path: str, at: int, bit: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ bit]), at)
