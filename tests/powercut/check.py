"""Opening what a power cut left, and comparing it with what must be there."""

from __future__ import annotations

from unittest import mock

from protocol.checksum import block_checksums
from protocol.errors import BlockdError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_ZONE
from snapshots import metadata
from snapshots.chain import chain
from snapshots.masks import resolve
from snapshots.replica import Replica
from tests.powercut.expected import ZERO, Expected
from tests.powercut.found import Found, read
from tests.powercut.rebuild import AGAIN, RebuildHistory, begin
from tests.powercut.states import SECTOR_BYTES
from tests.snapshots.model import BLOCK_COUNT, BLOCKS, REGION, fill, kill

PROBES = (3, REGION - 1, REGION, BLOCK_COUNT - 1)  # blocks that are written after opening


class Violation(AssertionError):
    """A power cut did what it must not."""


def check(path: str, expected: Expected, time: int, boot: int) -> None:
    """Open the directory that a cut at `time` left and look at everything."""
    boots = iter(range(boot, 1 << 60))
    with mock.patch.object(metadata, "boot_id", side_effect=lambda: f"boot {next(boots)}"):
        replica = _open(path)
        zones = set(replica.recovered_zones)
        try:
            found = read(replica)
            _check_blocks(expected, time, found)
            _check_snapshots(expected, time, found)
            _check_zones(expected, time, found, zones)
            _check_structure(replica)
            _check_second_open(path, replica, found, zones)
        except (BlockdError, AssertionError) as error:
            if isinstance(error, Violation):
                raise
            raise Violation(f"{type(error).__name__}: {error}") from error


def _open(path: str) -> Replica:
    try:
        return Replica.open(path)
    except (BlockdError, AssertionError, OSError, ValueError) as error:
        raise Violation(f"it does not open: {error}") from error


def _check_blocks(expected: Expected, time: int, found: Found) -> None:
    for block in expected.blocks:
        content = found.live.get(block, ZERO)
        allowed = expected.allowed(block, time, found.head_id)
        if content in allowed:
            continue
        for start in range(0, BLOCK_BYTES, SECTOR_BYTES):
            sector = content[start : start + SECTOR_BYTES]
            if all(other[start : start + SECTOR_BYTES] != sector for other in allowed):
                raise Violation(
                    f"block {block} holds {_told(content)} at byte {start}, "
                    f"allowed are {[_told(other) for other in allowed]}"
                )


def _told(content: bytes) -> str:
    numbers = [
        int.from_bytes(content[at : at + 4], "little") for at in range(0, BLOCK_BYTES, SECTOR_BYTES)
    ]
    return str(numbers[0] if len(set(numbers)) == 1 else numbers)


def _check_snapshots(expected: Expected, time: int, found: Found) -> None:
    there = set(found.snapshots)
    lost, foreign = expected.must_snapshots(time) - there, there - expected.may_snapshots(time)
    if lost or foreign:
        raise Violation(f"snapshots {sorted(lost)} are lost, {sorted(foreign)} cannot be")
    for layer_id, content in found.snapshots.items():
        wanted = expected.snapshots[layer_id].content
        for block in expected.blocks:
            if content.get(block, ZERO) != wanted.get(block, ZERO):
                raise Violation(
                    f"block {block} of snapshot {layer_id} holds "
                    f"{_told(content.get(block, ZERO))}, not {_told(wanted.get(block, ZERO))}"
                )


def _check_zones(expected: Expected, time: int, found: Found, zones: set[int]) -> None:
    newest = expected.newest(time)
    differing = {b for b in expected.blocks if found.live.get(b, ZERO) != newest[b]}
    silent = {block // BLOCKS_PER_ZONE for block in differing} - zones
    if silent:
        raise Violation(f"zones {sorted(silent)} differ from the other members and say nothing")
    forgotten = expected.unstable_zones(time) - zones
    if forgotten:
        raise Violation(f"zones {sorted(forgotten)} are clean before every member has them")


def _check_structure(replica: Replica) -> None:
    """Index and maps say the same; nothing is anywhere else."""
    layers = [
        replica.layer_file(info.id)
        for info in chain(replica.metadata.layers, replica.metadata.head_id)
    ]
    for region in range(replica.head.region_count):
        start = region * REGION
        wanted = resolve((layer.slot, layer.map_block(region)) for layer in layers)
        index = replica.index.memory[start : start + REGION]
        if index != wanted:
            raise Violation(f"the index of region {region} is not what the maps say")
    known, block = set(BLOCKS), 0
    for count, is_data in replica.extents(0, BLOCK_COUNT):
        if is_data and not known.issuperset(range(block, block + count)):
            raise Violation(f"blocks {block} to {block + count} were never written")
        block += count


def _check_second_open(path: str, replica: Replica, found: Found, zones: set[int]) -> None:
    """A cut right after opening, a kill, and a clean end change nothing; writes go on."""
    kill(replica)
    replica = _open(path)
    _same(found, read(replica), "a second open")
    if not zones <= set(replica.recovered_zones):
        raise Violation("a second open knows less about what may differ")
    live = dict(found.live)
    for number, block in enumerate(PROBES):
        content = fill(0xFFFFFF00 + number)
        data = memoryview(content)
        replica.write(block, 1, data, block_checksums(data))
        live[block] = content
    replica.zero(PROBES[0], 1)
    live.pop(PROBES[0], None)
    replica.flush()
    while replica.maintain():
        pass
    wanted = Found(found.head_id, live, found.snapshots)
    _same(wanted, read(replica), "writing and folding")
    replica.close()
    replica = _open(path)
    _same(wanted, read(replica), "a clean end")
    _check_structure(replica)
    kill(replica)


def _same(wanted: Found, found: Found, what: str) -> None:
    if wanted != found:
        different = {b for b in BLOCKS if wanted.live.get(b) != found.live.get(b)}
        raise Violation(f"after {what} it reads differently, blocks {sorted(different)[:8]}")


def _check_stamps(history: RebuildHistory, time: int, replica: Replica) -> None:
    """It may be a source later, so it knows what changed while it was away."""
    if time >= history.ends:
        for zone, stamp in enumerate(history.stamps):
            if replica.dirty.stamp(zone, AGAIN) < stamp:
                raise Violation(f"zone {zone} changed in configuration {stamp}, it forgot that")


def check_rebuild(path: str, history: RebuildHistory, time: int, boot: int) -> None:
    """Open what a cut at `time` left, make it equal to the other member, and compare them."""
    boots = iter(range(boot, 1 << 60))
    with mock.patch.object(metadata, "boot_id", side_effect=lambda: f"boot {next(boots)}"):
        replica = _open(path)
        try:
            if replica.complete and not history.begins <= time < history.ends:
                zones = set(replica.recovered_zones)
                found = read(replica)
                expected = history.before if time < history.begins else history.expected
                _check_blocks(expected, time, found)
                _check_snapshots(expected, time, found)
                _check_zones(expected, time, found, zones)
                _check_structure(replica)
                _check_stamps(history, time, replica)
            elif not replica.complete and time >= history.ends:
                raise Violation("it is incomplete again")
            sync = begin(history.other, replica, history.since(time))
            sync.copy()
            sync.end()
            assert history.final is not None
            _same(history.final, read(replica), "a rebuild")
            _check_structure(replica)
            kill(replica)
            replica = _open(path)
            _same(history.final, read(replica), "a rebuild and a cut")
            kill(replica)
        except (BlockdError, AssertionError) as error:
            if isinstance(error, Violation):
                raise
            raise Violation(f"{type(error).__name__}: {error}") from error
