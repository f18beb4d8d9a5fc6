"""The control device of the kernel's ublk driver: /dev/ublk-control.

A ublk device is a pair: the block device /dev/ublkbN and the character device /dev/ublkcN, through
which its server fetches requests and commits results (blockd/daemons/ublk.py). This module adds,
starts, recovers, stops and deletes such pairs. Every call blocks; START_DEV and END_USER_RECOVERY
until the server has fetched all tags, STOP_DEV until what the page cache holds was written. So a
server calls them in a thread while its loop serves the device.

A device knows whose it is: the 64 bits `ublksrv_flags` of its description belong to the server and
are kept by the kernel. They hold a hash of volume and snapshot (`mark_of`), so nothing needs to be
written down, and neither a reboot nor a reused number can give a volume another one's device.

Commands are ioctl-encoded, which needs kernel 6.4; GET_FEATURES needs 6.5. Sources:
include/uapi/linux/ublk_cmd.h, Documentation/block/ublk.rst, drivers/block/ublk_drv.c of 6.12.
"""

from __future__ import annotations

import errno
import os
import struct
from types import TracebackType
from typing import NamedTuple

from blockd.kernel.io_uring import Ring, address_of, result_of
from protocol.checksum import blake2b

CONTROL = "/dev/ublk-control"
DEVICES = "/sys/class/ublk-char"

# Features, also flags of a device.
USER_RECOVERY = 1 << 3  # the device outlives its server
USER_RECOVERY_REISSUE = 1 << 4  # and requests under way are given to the next one
CMD_IOCTL_ENCODE = 1 << 6

# States of a device.
DEAD, LIVE, QUIESCED = 0, 1, 2

# Attributes of the block device.
READ_ONLY, VOLATILE_CACHE, FUA = 1 << 0, 1 << 2, 1 << 3

# Operations in the low 8 bits of a descriptor's first word, and flags above.
OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_WRITE_ZEROES = 0, 1, 2, 3, 5
IO_FUA, IO_NOUNMAP = 1 << 13, 1 << 15

_COMMAND = struct.Struct("<IHHQQHHI")  # dev_id, queue_id, len, addr, data, dev_path_len, 0, 0
IO_COMMAND = struct.Struct("<HHiQ")  # q_id, tag, result, addr
_INFO = struct.Struct("<HHHHIIiIQQIIQQ")
IO_DESCRIPTOR_BYTES = 24  # op and flags, sectors (u32 each), first sector, addr (u64 each)
_BASIC = struct.Struct("<IBBBBIIQQ")
_DISCARD = struct.Struct("<IIIIHH")
_HEADER = struct.Struct("<II")
_PARAMS_BASIC, _PARAMS_DISCARD = 1 << 0, 1 << 1
_NO_QUEUE = 0xFFFF
ANY_ID = 0xFFFFFFFF
QUEUE_DEPTH_MAX = 4096  # descriptors of two queues are so many apart in the map
SECTOR_SHIFT = 9
_DISCARD_BYTES_MAX = 1 << 30  # one request; the engine takes it in steps


def _code(number: int, size: int, direction: int) -> int:
    return direction << 30 | size << 16 | ord("u") << 8 | number


def _read(number: int) -> int:
    return _code(number, _COMMAND.size, 2)


def _change(number: int) -> int:
    return _code(number, _COMMAND.size, 3)


FETCH = _code(0x20, IO_COMMAND.size, 3)
COMMIT_AND_FETCH = _code(0x21, IO_COMMAND.size, 3)
_GET_INFO, _GET_FEATURES, _DELETE_ASYNC = _read(0x02), _read(0x13), _read(0x14)
_ADD, _DELETE, _START, _STOP, _SET_PARAMS = map(_change, (0x04, 0x05, 0x06, 0x07, 0x08))
_START_RECOVERY, _END_RECOVERY = _change(0x10), _change(0x11)
_NAMES = {
    _GET_INFO: "GET_DEV_INFO",
    _GET_FEATURES: "GET_FEATURES",
    _ADD: "ADD_DEV",
    _DELETE: "DEL_DEV",
    _DELETE_ASYNC: "DEL_DEV_ASYNC",
    _START: "START_DEV",
    _STOP: "STOP_DEV",
    _SET_PARAMS: "SET_PARAMS",
    _START_RECOVERY: "START_USER_RECOVERY",
    _END_RECOVERY: "END_USER_RECOVERY",
}


class Info(NamedTuple):
    """A device: `pid` is that of the process that started it last."""

    id: int
    state: int
    pid: int
    flags: int
    mark: int
    queues: int
    depth: int
    io_bytes: int

    @property
    def path(self) -> str:
        """The block device."""
        return f"/dev/ublkb{self.id}"

    @property
    def character_path(self) -> str:
        """What its server opens."""
        return f"/dev/ublkc{self.id}"

    @property
    def outlives_server(self) -> bool:
        """Does it wait for another server when its own is gone?"""
        return bool(self.flags & USER_RECOVERY)


class Parameters(NamedTuple):
    """What the block device looks like."""

    size_bytes: int
    block_bytes: int  # logical; the physical block is never smaller than 4 KiB
    read_only: bool


def mark_of(identity: str) -> int:
    """By which the device of a volume (its UUID), or of a snapshot (UUID@NAME), is known; not 0."""
    digest = blake2b(identity.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def device_ids() -> list[int]:
    """The devices there are, started or not."""
    try:
        names = os.listdir(DEVICES)
    except FileNotFoundError:
        return []
    return sorted(int(name.removeprefix("ublkc")) for name in names)


def pack_info(wanted: Info) -> bytearray:
    """The description of a device that is to be added."""
    head = wanted.queues, wanted.depth, 0, 0, wanted.io_bytes, wanted.id
    return bytearray(_INFO.pack(*head, 0, 0, wanted.flags, wanted.mark, 0, 0, 0, 0))


def unpack_info(data: bytearray) -> Info:
    """What the kernel says of a device."""
    queues, depth, state, _, io_bytes, number, pid, _, flags, mark, *_ = _INFO.unpack(data)
    return Info(number, state, pid, flags, mark, queues, depth, io_bytes)


def pack_parameters(wanted: Parameters, io_bytes: int) -> bytearray:
    """The parameters of a block device that takes requests of at most `io_bytes`."""
    logical = wanted.block_bytes.bit_length() - 1
    physical = max(logical, 12)
    attributes = READ_ONLY if wanted.read_only else VOLATILE_CACHE | FUA
    basic = _BASIC.pack(
        attributes,
        logical,
        physical,
        physical,
        physical,
        io_bytes >> SECTOR_SHIFT,
        0,
        wanted.size_bytes >> SECTOR_SHIFT,
        0,
    )
    sectors = _DISCARD_BYTES_MAX >> SECTOR_SHIFT
    discard = _DISCARD.pack(0, 1 << physical, sectors, sectors, 1, 0)
    length = _HEADER.size + len(basic) + len(discard)
    return bytearray(_HEADER.pack(length, _PARAMS_BASIC | _PARAMS_DISCARD) + basic + discard)


class Control:
    """The control device, open; used as a context manager, by one thread."""

    def __init__(self) -> None:
        self._fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._ring = Ring(1, wide=True)
        except OSError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ring.close()
        os.close(self._fd)

    def _do(
        self, operation: int, number: int, buffer: bytearray | None = None, data: int = 0
    ) -> None:
        """One command; raises OSError."""
        address, length = (address_of(buffer), len(buffer)) if buffer is not None else (0, 0)
        payload = _COMMAND.pack(number, _NO_QUEUE, length, address, data, 0, 0, 0)
        self._ring.fill(0, self._fd, operation, payload)
        self._ring.submit((0,))
        self._ring.wait()
        result = result_of(self._ring.reap()[1])
        if result < 0:
            what = f"{_NAMES[operation]} of ublk device {number if number != ANY_ID else 'any'}"
            raise OSError(-result, f"{what}: {os.strerror(-result)}")

    def features(self) -> int:
        """What this kernel's driver can do."""
        answer = bytearray(8)
        self._do(_GET_FEATURES, 0, answer)
        return int.from_bytes(answer, "little")

    def info(self, number: int) -> Info:
        """One device; ENODEV if there is none."""
        answer = bytearray(_INFO.size)
        self._do(_GET_INFO, number, answer)
        return unpack_info(answer)

    def find(self, mark: int, likely: int | None = None) -> Info | None:
        """The device with this mark; `likely` is the number to look at first."""
        for number in sorted(device_ids(), key=lambda each: each != likely):
            try:
                found = self.info(number)
            except OSError:  # it went away in this moment, or is somebody else's
                continue
            if found.mark == mark:
                return found
        return None

    def add(self, wanted: Info, parameters: Parameters) -> Info:
        """Make a device; what the kernel made of it. The block device comes with `start`."""
        description = pack_info(wanted)
        self._do(_ADD, wanted.id, description)
        made = unpack_info(description)
        try:
            self._do(_SET_PARAMS, made.id, pack_parameters(parameters, made.io_bytes))
        except OSError:
            self.delete(made.id)
            raise
        return made

    def start(self, number: int, pid: int) -> None:
        """Make the block device appear; returns when the server has fetched all tags."""
        self._do(_START, number, data=pid)

    def start_recovery(self, number: int) -> None:
        """Let a new server fetch; EBUSY until the old one is gone entirely."""
        self._do(_START_RECOVERY, number)

    def end_recovery(self, number: int, pid: int) -> None:
        """Let requests flow again; returns when the server has fetched all tags."""
        self._do(_END_RECOVERY, number, data=pid)

    def stop(self, number: int) -> None:
        """Remove the block device; requests that wait for a server fail."""
        self._do(_STOP, number)

    def delete(self, number: int) -> None:
        """Remove the pair. What is still open of it goes away when it is closed."""
        try:
            self._do(_DELETE_ASYNC, number)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._do(_DELETE, number)  # before 6.9: returns when all of it is closed
