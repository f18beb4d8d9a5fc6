"""Sizes, limits and names that every part must agree on (each with its reason)."""

from __future__ import annotations

import re

from protocol.errors import RequestError

BLOCK_BYTES = 4096  # unit of presence and checksum; the page size of every supported machine
REGION_BYTES = 4 << 20  # unit of the layer map and of copying: 1024 blocks = one 4 KiB map block
ZONE_BYTES = 16 << 20  # unit of the dirty log; 4 KiB of index per zone
BLOCKS_PER_REGION = REGION_BYTES // BLOCK_BYTES
BLOCKS_PER_ZONE = ZONE_BYTES // BLOCK_BYTES
REGIONS_PER_ZONE = ZONE_BYTES // REGION_BYTES

SNAPSHOTS_MAX = 254  # index bytes 1..255 name a slot: 254 sealed layers and the head
PIECE_BYTES_MAX = 1 << 20  # one data message on the replica wire; bounds the peer's buffers
RATE_MIN = 64 << 10  # bytes per second; below it, a missing unit
REPLICAS_MAX = 16  # more copies cost every write; nobody has asked for more

SIZE_BYTES_MIN = 1 << 20  # below this no file system fits
SIZE_BYTES_MAX = 8 << 40  # a layer file of this size still fits ext4's 16 TiB file limit twice

NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE_PATTERN = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def check_name(kind: str, name: str) -> str:
    """Return `name` if it can name a volume or snapshot, else raise RequestError."""
    if not NAME_PATTERN.fullmatch(name):
        raise RequestError(
            f"{kind} name {name!r} is not usable: 1 to 63 characters a-z 0-9 . _ -, "
            "first and last a letter or digit; choose another name"
        )
    return name


def check_size(size_bytes: int) -> int:
    """Return `size_bytes` if a volume can have that size, else raise RequestError."""
    if not SIZE_BYTES_MIN <= size_bytes <= SIZE_BYTES_MAX:
        raise RequestError(
            f"size {size_bytes} bytes is outside 1 MiB ({SIZE_BYTES_MIN}) to 8 TiB "
            f"({SIZE_BYTES_MAX}); choose a size in between"
        )
    if size_bytes % BLOCK_BYTES:
        raise RequestError(
            f"size {size_bytes} bytes is not a multiple of {BLOCK_BYTES}; "
            f"the next that is: {-(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES}"
        )
    return size_bytes


def parse_rate(text: str) -> int:
    """Bytes per second of a rate such as 50M; units are powers of 1024."""
    match = _SIZE_PATTERN.fullmatch(text.strip().removesuffix("/s"))
    if match is None:
        raise RequestError(f"rate {text!r} is not a number with a unit K, M, G or T; example: 50M")
    number, unit = match.groups()
    return check_rate(int(float(number) * _UNITS[unit.upper()]))


def check_rate(bytes_per_second: int) -> int:
    """Raise RequestError unless something can be copied at this rate."""
    if bytes_per_second < RATE_MIN:
        raise RequestError(
            f"rate {bytes_per_second} bytes per second is below {RATE_MIN}; example: 50M"
        )
    return bytes_per_second


def check_min_in_sync(count: int) -> None:
    """Raise RequestError unless so many replicas can be asked for."""
    if not 1 <= count <= REPLICAS_MAX:
        raise RequestError(
            f"min-in-sync {count} is outside 1 to {REPLICAS_MAX}; choose how many replicas must be "
            "in sync for a write to be answered"
        )


def parse_size(text: str) -> int:
    """Bytes of a size such as 10G, 512MiB or 1048576; units are powers of 1024."""
    match = _SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise RequestError(
            f"size {text!r} is not a number with an optional unit K, M, G or T; example: 10G"
        )
    number, unit = match.groups()
    return check_size(int(float(number) * _UNITS[unit.upper()]))
