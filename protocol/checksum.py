"""The checksum of one 4 KiB block, as it stands in layer maps and on the replica wire.

It is CRC32C (RFC 3720, appendix B.4) with the values 0 to 3 set aside: an entry 0 means the block
is absent from the layer, 3 means it is all zeros; 1 and 2 mean nothing, so that no single flipped
bit makes one of these out of the other. A CRC of 0 to 3 is therefore written as 4 to 7.

The compiled half of the `crc32c` package is loaded by itself: its Python half reads the package's
metadata to know its version, which costs every daemon 2.5 MiB and 30 ms.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os

# Not through `hashlib`, which loads OpenSSL: 4 MiB in every daemon.
from _blake2 import blake2b as blake2b
from collections.abc import Callable

from protocol.units import BLOCK_BYTES


def _load() -> Callable[..., int]:
    package = importlib.util.find_spec("crc32c")
    assert package is not None, "the Python package crc32c is not installed; run `make setup`"
    for directory in package.submodule_search_locations or ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = os.path.join(directory, f"_crc32c{suffix}")
            if os.path.exists(path):
                loader = importlib.machinery.ExtensionFileLoader("_crc32c", path)
                spec = importlib.util.spec_from_loader("_crc32c", loader)
                assert spec is not None
                module = importlib.util.module_from_spec(spec)
                loader.exec_module(module)
                function: Callable[..., int] = module.crc32c
                return function
    from crc32c import crc32c as packaged

    return packaged


crc32c = _load()

ABSENT = 0
ZEROS = 3
UNUSABLE = 0xFFFFFFFF  # sent in place of an entry that cannot be, for no block to match


def block_checksum(block: memoryview | bytes | bytearray) -> int:
    """The map entry of one block of data."""
    crc = crc32c(block)
    return crc if crc > ZEROS else crc + 4


def block_checksums(data: memoryview) -> list[int]:
    """The map entries of consecutive whole blocks."""
    entries = []
    for start in range(0, len(data), BLOCK_BYTES):
        crc = crc32c(data[start : start + BLOCK_BYTES])
        entries.append(crc if crc > ZEROS else crc + 4)
    return entries
