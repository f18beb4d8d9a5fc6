"""The dirty log: which 16 MiB zones a crash may have left inconsistent or unlike other members.

A 4 KiB page with the newest member configuration this replica has heard of (magic, config_seq, CRC
of both; durable before anything relies on it), then one u64 per zone, little-endian, 512 per page:

    bits 0..30   stamp: all changes of the zone were made in this member configuration or before
    bit 31       dirty: the zone was changed since it was last known to be the same on all members
    bits 32..63  CRC32C of the zone's index page when the zone became clean; 0: not known

A dirty bit is durable before the first write into a clean zone (RWF_DSYNC). A zone becomes clean
after its data and index page are durable here and its changes are durable on every member that
counts (`Store.stable`); that is written without syncing: a lost clearing only costs work. An entry
never tears: sectors are old or new. So a clean zone has a right index page, no block that differs
from its checksum, and any member that was in sync in a configuration after its stamp has it too.

In memory each zone is in one of three states:

    CLEAN  bit clear                                        `mark` -> HOT
    COOL   bit set, nothing written since a flush began     `mark` -> HOT, `clear` -> CLEAN
    HOT    bit set, written since the last flush began      `cool` -> COOL
"""

from __future__ import annotations

import contextlib
import os
import struct
from array import array
from collections.abc import Iterable, Mapping

from protocol.checksum import crc32c
from protocol.errors import StorageError
from protocol.units import BLOCK_BYTES
from snapshots.index import open_sized
from snapshots.syscalls import storage_error

CLEAN, COOL, HOT = 0, 1, 2
DIRTY = 1 << 31
_STAMP = DIRTY - 1
_ZONES_PER_PAGE = BLOCK_BYTES // 8
_MAGIC = b"blockdDL"
_HEADER = struct.Struct("<8sQI")  # within one sector: old or new, never torn
_STATE_OF_BYTE = bytes(COOL if byte & 0x80 else CLEAN for byte in range(256))  # the one of bit 31


def dirty_bytes(zone_count: int) -> int:
    """Length of the dirty log: whole pages."""
    return (1 - -zone_count // _ZONES_PER_PAGE) * BLOCK_BYTES


def header(config_seq: int) -> bytes:
    """The first page."""
    content = struct.pack("<8sQ", _MAGIC, config_seq)
    return (content + struct.pack("<I", crc32c(content))).ljust(BLOCK_BYTES, b"\0")


class DirtyLog:
    """The open dirty log. `zones` (one state byte per zone) is read directly by the data path."""

    def __init__(self, path: str, zone_count: int) -> None:
        self.path = path
        self.fd = -1
        self.fd = open_sized(path, dirty_bytes(zone_count))
        try:
            content = os.pread(self.fd, dirty_bytes(zone_count), 0)
        except OSError as error:
            raise storage_error("reading", path, error) from error
        magic, self.config_seq, _ = _HEADER.unpack_from(content)
        if magic != _MAGIC or content[:BLOCK_BYTES] != header(self.config_seq):
            raise StorageError(
                f"{path} has a damaged first page; rebuild this replica from another member"
            )
        content = content[BLOCK_BYTES:]
        self._entries = array("Q", content)
        self.zones = bytearray(content[3 : zone_count * 8 : 8].translate(_STATE_OF_BYTE))
        self.hot: list[int] = []  # every HOT zone once

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def dirty_zones(self) -> list[int]:
        """All zones whose bit is set."""
        return [zone for zone, state in enumerate(self.zones) if state != CLEAN]

    def changed_since(self, config_seq: int) -> list[int]:
        """The zones that a member without configuration `config_seq` and later may not have."""
        lows = memoryview(self._entries).cast("B").cast("I")[0 : 2 * len(self.zones) : 2].tolist()
        return [zone for zone, low in enumerate(lows) if low >= config_seq]  # dirty: >= 2^31

    def stamp(self, zone: int, dirty_stamp: int) -> int:
        """The stamp of a zone; of a dirty one at least `dirty_stamp`."""
        entry = self._entries[zone]
        return max(entry & _STAMP, dirty_stamp) if entry & DIRTY else entry & _STAMP

    def page_checksum(self, zone: int) -> int:
        """The CRC32C that the index page of a clean zone must have; 0: not known."""
        entry = self._entries[zone]
        return 0 if entry & DIRTY else entry >> 32

    def note_config(self, config_seq: int) -> None:
        """Remember a member configuration, durably, unless a newer one is known."""
        if config_seq > self.config_seq:
            try:
                os.pwritev(self.fd, [header(config_seq)], 0, os.RWF_DSYNC)
            except OSError as error:
                raise storage_error("writing", self.path, error) from error
            self.config_seq = config_seq

    def mark(self, numbers: Iterable[int]) -> None:
        """Make zones HOT; returns when every bit is durable. On failure no state has changed."""
        zones, entries = self.zones, self._entries
        numbers = list(numbers)
        clean = {zone: entries[zone] for zone in numbers if zones[zone] == CLEAN}
        if clean:
            for zone in clean:
                entries[zone] |= DIRTY
            try:
                self._write_pages(clean, os.RWF_DSYNC)
            except OSError as error:
                for zone, entry in clean.items():
                    entries[zone] = entry
                raise storage_error("writing", self.path, error) from error
        for zone in numbers:
            if zones[zone] != HOT:
                zones[zone] = HOT
                self.hot.append(zone)

    def cool(self) -> list[int]:
        """Make every HOT zone COOL and return them."""
        cooled = self.hot
        for zone in cooled:
            self.zones[zone] = COOL
        self.hot = []
        return cooled

    def clear(self, checksums: Mapping[int, int], stamp: int) -> None:
        """Make those zones clean that are still COOL; `checksums` are those of their index pages.

        Never fails: a bit that stays set in the file costs work after a crash and nothing else.
        """
        cold = [zone for zone in checksums if self.zones[zone] == COOL]
        for zone in cold:
            newest = max(self._entries[zone] & _STAMP, stamp)
            self._entries[zone] = newest | checksums[zone] << 32
            self.zones[zone] = CLEAN
        with contextlib.suppress(OSError):
            self._write_pages(cold, 0)

    def raise_stamps(self, stamps: Mapping[int, int]) -> None:
        """Zones were changed elsewhere as late as these configurations; durable with `sync`."""
        raised = [zone for zone, stamp in stamps.items() if self._entries[zone] & _STAMP < stamp]
        for zone in raised:
            self._entries[zone] = self._entries[zone] & ~_STAMP | stamps[zone]
        try:
            self._write_pages(raised, 0)
        except OSError as error:
            raise storage_error("writing", self.path, error) from error

    def sync(self) -> None:
        """Make everything durable that was written without syncing."""
        os.fdatasync(self.fd)

    def _write_pages(self, zones: Iterable[int], flags: int) -> None:
        view = memoryview(self._entries).cast("B")
        for page in sorted({zone // _ZONES_PER_PAGE for zone in zones}):
            start = page * BLOCK_BYTES
            content = view[start : start + BLOCK_BYTES]
            written = os.pwritev(self.fd, [content], start + BLOCK_BYTES, flags)
            if written != BLOCK_BYTES:  # the space exists since creation: short is an error
                raise OSError(5, f"only {written} of {BLOCK_BYTES} bytes written")
