"""The dirty log: one durable bit per 16 MiB zone, set before the first write into a clean zone.

It bounds all work after a crash: a zone whose bit is clear has a durable index page, has no block
that differs from its checksum and is the same on every member. Bits are set with RWF_DSYNC and
cleared lazily without it (a lost clearing only costs work).

In memory each zone is in one of three states:

    CLEAN  bit clear                                        `mark` -> HOT
    COOL   bit set, nothing written since a flush began     `mark` -> HOT, `clear` -> CLEAN
    HOT    bit set, written since the last flush began      `cool` -> COOL

`clear` comes after a flush that began later than the last write, and an index sync, are done.
A power cut can tear a page of the file at sector bounds: each sector is old or new, both are valid.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from protocol.units import BLOCK_BYTES
from snapshots.index import open_sized
from snapshots.syscalls import storage_error

CLEAN, COOL, HOT = 0, 1, 2
_ZONES_PER_PAGE = BLOCK_BYTES * 8


def dirty_bytes(zone_count: int) -> int:
    """Length of the dirty log: whole pages."""
    return -(-zone_count // _ZONES_PER_PAGE) * BLOCK_BYTES


class DirtyLog:
    """The open dirty log. `zones` (one state byte per zone) is read directly by the data path."""

    def __init__(self, path: str, zone_count: int) -> None:
        self.path = path
        self.fd = -1
        self.fd = open_sized(path, dirty_bytes(zone_count))
        self.zones = bytearray(zone_count)
        self.hot: list[int] = []  # every HOT zone once
        try:
            self._bits = bytearray(os.pread(self.fd, dirty_bytes(zone_count), 0))
        except OSError as error:
            raise storage_error("reading", path, error) from error
        for number, byte in enumerate(self._bits):
            if byte:
                for zone in range(number * 8, min(number * 8 + 8, zone_count)):
                    if byte >> (zone & 7) & 1:
                        self.zones[zone] = COOL

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def dirty_zones(self) -> list[int]:
        """All zones whose bit is set."""
        return [zone for zone, state in enumerate(self.zones) if state != CLEAN]

    def mark(self, numbers: Iterable[int]) -> None:
        """Make zones HOT; returns when every bit is durable. On failure no state has changed."""
        zones = self.zones
        numbers = list(numbers)
        clean = [zone for zone in numbers if zones[zone] == CLEAN]
        if clean:
            for zone in clean:
                self._bits[zone >> 3] |= 1 << (zone & 7)
            try:
                self._write_pages(clean, os.RWF_DSYNC)
            except OSError as error:
                for zone in clean:
                    self._bits[zone >> 3] &= ~(1 << (zone & 7)) & 0xFF
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

    def clear(self, zones: Iterable[int]) -> None:
        """Clear the bits of those of `zones` that are still COOL.

        Never fails: a bit that stays set in the file costs work after a crash and nothing else.
        """
        cold = [zone for zone in zones if self.zones[zone] == COOL]
        for zone in cold:
            self._bits[zone >> 3] &= ~(1 << (zone & 7)) & 0xFF
            self.zones[zone] = CLEAN
        with contextlib.suppress(OSError):
            self._write_pages(cold, 0)

    def sync(self) -> None:
        """Make cleared bits durable too."""
        os.fdatasync(self.fd)

    def _write_pages(self, zones: list[int], flags: int) -> None:
        for page in sorted({zone // _ZONES_PER_PAGE for zone in zones}):
            start = page * BLOCK_BYTES
            view = memoryview(self._bits)[start : start + BLOCK_BYTES]
            written = os.pwritev(self.fd, [view], start, flags)
            if (
                written != BLOCK_BYTES
            ):  # the space exists since creation; anything short is an error
                raise OSError(5, f"only {written} of {BLOCK_BYTES} bytes written")
