"""Checking a replica directory without a daemon, and making anew what can be derived.

`check` reads everything and changes nothing: layer files, every map entry against its data, the
index pages of clean zones, the dirty log. `repair` makes index and dirty log anew and removes files
that belong to no layer; damaged data and maps can only come from another replica (`blockd volume
verify`). If the dirty log is lost, every zone of the new one is dirty, so the replica is compared
as a whole when it is a member again.

After an unclean end blocks of the head in dirty zones may not match their entries; the next start
repairs that, and it is no damage.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from protocol.checksum import ZEROS, block_checksum, crc32c
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES, BLOCKS_PER_REGION, BLOCKS_PER_ZONE, REGIONS_PER_ZONE
from snapshots import chain
from snapshots.directory import layer_files
from snapshots.dirty import CLEAN, DIRTY, dirty_bytes, header
from snapshots.index import Index, index_bytes
from snapshots.layer import LayerFile
from snapshots.masks import masks, resolve, runs
from snapshots.metadata import LayerInfo
from snapshots.offline import Damaged, OfflineReplica
from snapshots.syscalls import storage_error, sync_directory, write_all

PROBLEMS_MAX = 1000  # listed; all are counted

Progress = Callable[[int, int], None]
"""layers looked at, layers in all"""


@dataclass
class Report:
    """What was found. `derived` can be repaired here, `damage` needs another replica."""

    layers: int = 0
    blocks: int = 0
    unclean: bool = False
    dirty_zones: int = 0
    damage_count: int = 0
    damage: list[str] = field(default_factory=list)
    damaged_blocks: list[Damaged] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)
    repaired: bool = False

    def damaged(self, text: str, block: Damaged | None = None) -> None:
        """Note something that is lost here."""
        self.damage_count += 1
        if len(self.damage) < PROBLEMS_MAX:
            self.damage.append(text)
            self.damaged_blocks += [block] if block is not None else []


def check(replica: OfflineReplica, progress: Progress = lambda done, total: None) -> Report:
    """Look at everything."""
    report = Report(unclean=not replica.metadata.clean)
    infos = replica.metadata.layers
    for info in infos:
        if info.id in replica.missing:
            report.damaged(replica.missing[info.id])
    for number, info in enumerate(infos):
        progress(number, len(infos))
        if info.id in replica.layers:
            _check_layer(replica, info, report)
            report.layers += 1
    progress(len(infos), len(infos))
    if replica.dirty is None:
        report.derived.append(replica.dirty_error)
        if report.unclean:
            report.damaged(
                "after an unclean end, without a dirty log, nobody knows which blocks were being "
                "written; fill this replica anew from another one"
            )
    else:
        report.dirty_zones = len(replica.dirty.dirty_zones())
    if not replica.missing:
        _check_index(replica, report)
    if not report.unclean:  # else they are what the next start removes
        report.derived += [f"{path} belongs to no layer" for path in _strangers(replica)]
    return report


def _check_layer(replica: OfflineReplica, info: LayerInfo, report: Report) -> None:
    layer = replica.layers[info.id]
    is_head = info.id == replica.metadata.head_id
    buffer = memoryview(bytearray(BLOCKS_PER_REGION * BLOCK_BYTES))
    name = f"layer {info.id}" + (f" (snapshot {info.name})" if info.name else "")
    for region in layer.regions():
        content = layer.map_block(region)
        entries = memoryview(content).cast("I")
        _, data = masks(content)
        under_way = is_head and not replica.is_settled(region)
        for start, count in runs(data):
            report.blocks += count
            bad = _bad_blocks(layer, region, start, count, entries, buffer)
            for number in [] if under_way else bad:
                block = region * BLOCKS_PER_REGION + number
                what = "a map entry that cannot be" if entries[number] < ZEROS else "damaged data"
                report.damaged(f"{name}: block {block} has {what}", (info.id, block))


def _bad_blocks(
    layer: LayerFile, region: int, start: int, count: int, entries: memoryview, buffer: memoryview
) -> list[int]:
    content = buffer[: count * BLOCK_BYTES]
    first = region * BLOCKS_PER_REGION + start
    try:
        layer.read(first, count, content)
    except StorageError:
        if count == 1:
            return [start]
        return [
            number
            for at in range(start, start + count)
            for number in _bad_blocks(layer, region, at, 1, entries, buffer)
        ]
    return [
        start + number
        for number in range(count)
        if block_checksum(content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        != entries[start + number]
    ]


def _check_index(replica: OfflineReplica, report: Report) -> None:
    try:
        index = Index(os.path.join(replica.path, "index"), replica.block_count)
    except StorageError as error:
        report.derived.append(str(error))
        return
    used = used_zones(replica)
    block = index.next_used(0)
    while block < replica.block_count:
        zone = block // BLOCKS_PER_ZONE
        used.add(zone)
        block = index.next_used((zone + 1) * BLOCKS_PER_ZONE)
    for zone in sorted(used):
        if not replica.is_settled(zone * REGIONS_PER_ZONE):
            continue
        index.warm(zone)
        page = index.page(zone)
        known = replica.dirty.page_checksum(zone) if replica.dirty is not None else 0
        if (known and crc32c(page) != known) or page != expected_page(replica, zone):
            report.derived.append(f"the index page of zone {zone} is not what the maps say")


def used_zones(replica: OfflineReplica) -> set[int]:
    """Zones in which the live volume may have data."""
    return {region // REGIONS_PER_ZONE for region in replica.regions(replica.metadata.head_id)}


def expected_page(replica: OfflineReplica, zone: int) -> bytes:
    """What the index says of a zone, from the maps of the live chain."""
    infos = chain.chain(replica.metadata.layers, replica.metadata.head_id)
    first = zone * REGIONS_PER_ZONE
    parts = [
        resolve((info.slot, replica.layers[info.id].map_block(region)) for info in infos)
        for region in range(first, min(first + REGIONS_PER_ZONE, replica.region_count))
    ]
    return b"".join(parts).ljust(BLOCKS_PER_ZONE, b"\0")


def _strangers(replica: OfflineReplica) -> list[str]:
    """Files among the layers that belong to none of them."""
    metadata, folder = replica.metadata, os.path.join(replica.path, "layers")
    wanted = layer_files(replica.path, metadata.layers, metadata.head_id)
    found = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return [path for path in found if path not in wanted]


def repair(replica: OfflineReplica, report: Report) -> None:
    """Make anew what `check` found to be derived and wrong; durable when it returns.

    StorageError: nothing was changed, because layers are missing or the dirty log is lost after an
    unclean end.
    """
    if replica.missing or (replica.dirty is None and report.unclean):
        raise StorageError(f"replica {replica.path} cannot be repaired: {report.damage[0]}")
    if not report.derived:
        return
    try:
        for path in _strangers(replica):
            os.unlink(path)
        sync_directory(os.path.join(replica.path, "layers"))
        _new_index(replica)  # first: the old log's checksums do not match a page that was wrong
        _new_dirty_log(replica)
    except OSError as error:
        raise storage_error("repairing replica", replica.path, error) from error
    report.repaired = True


def _new_dirty_log(replica: OfflineReplica) -> None:
    """Without checksums of index pages; if nothing is known of the zones, all are dirty."""
    zones = array("Q", [DIRTY]) * replica.zone_count
    config_seq, old = replica.metadata.config_seq, replica.dirty
    if old is not None:
        config_seq = max(config_seq, old.config_seq)
        for zone, state in enumerate(old.zones):
            zones[zone] = old.stamp(zone, 0) | (DIRTY if state != CLEAN else 0)
    content = header(config_seq) + zones.tobytes()
    length = dirty_bytes(replica.zone_count)
    _replace(os.path.join(replica.path, "dirty.log"), length, [(0, content.ljust(length, b"\0"))])


def _new_index(replica: OfflineReplica) -> None:
    pages = ((zone * BLOCKS_PER_ZONE, expected_page(replica, zone)) for zone in used_zones(replica))
    _replace(os.path.join(replica.path, "index"), index_bytes(replica.block_count), pages)


def _replace(path: str, length: int, parts: Iterable[tuple[int, bytes]]) -> None:
    """Another file in place of one, durably: (offset, content) parts, holes between them."""
    temporary = path + ".tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(fd, length)
        for offset, content in parts:
            write_all(fd, content, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(os.path.dirname(path))
