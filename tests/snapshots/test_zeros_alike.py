"""Members that say the same zeros in different ways are the same.

A member that is being filled records every trim, because what lies below may not be right yet; the
others record only those that hide something. Proves that digests and checks of logical layers do
not tell them apart, and still tell zeros that hide data from none.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.checksum import ABSENT, ZEROS
from protocol.units import BLOCK_BYTES
from snapshots.logical import ABSENT_DIGEST, ZEROS_DIGEST
from snapshots.replica import Replica
from tests.snapshots.model import Model, fill

ZERO = bytes(BLOCK_BYTES)


def with_entries(directory: Path, below: list[int], explicit: list[int]) -> Replica:
    """A root with blocks `below` (0: a block of zeros), and a head with ZEROS where it is said."""
    model = Model(directory)
    for number, value in enumerate(below):
        if value >= 0:
            model.write(number, [value])
    model.seal()
    replica = model.replica
    replica.flush()
    for block in explicit:
        replica.head.make_writable(0)
        replica.head.map[1024 + block] = ZEROS
    return replica


@pytest.mark.parametrize("value", [-1, 0])
def test_zeros_above_nothing_are_like_none(tmp_path: Path, value: int) -> None:
    plain = with_entries(tmp_path / "a", [value, 7], [])
    marked = with_entries(tmp_path / "b", [-1, 7], [0])
    for replica in (plain, marked):
        assert replica.layer_digests(2, 1, 0, 2) == ABSENT_DIGEST * 2
    assert plain.layer_check(2, 1, 0, 1) == marked.layer_check(2, 1, 0, 1)
    target = memoryview(bytearray(8 + 2 * BLOCK_BYTES))
    assert marked.layer_read(2, 1, 0, 2, target) == 8
    assert target[:8].cast("I").tolist() == [ABSENT, ABSENT]
    plain.close()
    marked.close()


def test_zeros_that_hide_data_count(tmp_path: Path) -> None:
    replica = with_entries(tmp_path / "a", [5, 7], [0])
    other = with_entries(tmp_path / "b", [5, 7], [])
    assert replica.layer_digests(2, 1, 0, 2) == ZEROS_DIGEST + ABSENT_DIGEST
    assert replica.layer_check(2, 1, 0, 1) != other.layer_check(2, 1, 0, 1)
    target = memoryview(bytearray(8 + 2 * BLOCK_BYTES))
    assert replica.layer_read(2, 1, 0, 2, target) == 8
    assert target[:8].cast("I").tolist() == [ZEROS, ABSENT]
    replica.close()
    other.close()


def test_a_checksum_of_zeros_alone_proves_nothing(tmp_path: Path) -> None:
    """The block below has the checksum of zeros and other data, which must stay hidden."""
    replica = with_entries(tmp_path / "a", [0], [0])
    root = replica.layer_file(1)
    root.write(0, memoryview(fill(9)))
    assert replica.layer_digests(2, 1, 0, 1) == ZEROS_DIGEST
    replica.close()
