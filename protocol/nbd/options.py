"""Option data of the handshake: bytes to values, values to bytes.

Called by handshake.py only. A parse function raises OptionError with the option reply the client
gets; nothing here ends a connection. Every length in the data is checked against the data that is
really there before it is used. Layouts ("Option types", "Option reply types"):

    INFO, GO               name length u32 | name | request count u16 | requests u16 each
    LIST/SET_META_CONTEXT  name length u32 | name | query count u32 | (length u32 | query) each
    option reply           magic u64 | option u32 | reply type u32 | length u32 | data
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from protocol.nbd import constants as c
from protocol.nbd.exports import Export

_REPLY = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")


class OptionError(Exception):
    """An option the client may not have; `reply` is the option reply type, the text goes along."""

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class _Reader:
    """Takes values from the front of option data and never reads past its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, what: str, count: int) -> bytes:
        stop = self.position + count
        if stop > len(self.data):
            raise OptionError(
                c.REP_ERR_INVALID,
                f"{what} takes {count} bytes, only {len(self.data) - self.position} are left",
            )
        part = self.data[self.position : stop]
        self.position = stop
        return part

    def u16(self, what: str) -> int:
        return int(_U16.unpack(self.take(what, 2))[0])

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(what, 4))[0])

    def string(self, what: str) -> str:
        return decode_string(what, self.take(what, self.u32(f"length of {what}")))

    def finish(self) -> None:
        left = len(self.data) - self.position
        if left:
            raise OptionError(c.REP_ERR_INVALID, f"{left} bytes follow the end of the option")


def decode_string(what: str, data: bytes) -> str:
    """A string as "Conventions" defines it: UTF-8, no NUL, at most 4096 bytes."""
    if len(data) > c.STRING_BYTES_MAX:
        raise OptionError(
            c.REP_ERR_INVALID, f"{what} has {len(data)} bytes, at most {c.STRING_BYTES_MAX}"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise OptionError(c.REP_ERR_INVALID, f"{what} is not UTF-8") from None
    if "\0" in text:
        raise OptionError(c.REP_ERR_INVALID, f"{what} contains a NUL character")
    return text


def require_empty(name: str, data: bytes) -> None:
    """Refuse data on an option that has none."""
    if data:
        raise OptionError(c.REP_ERR_INVALID, f"{name} takes no data, {len(data)} bytes came")


def parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """Export name and the information types asked for, of INFO and GO."""
    reader = _Reader(data)
    name = reader.string("export name")
    count = reader.u16("number of information requests")
    wanted = frozenset(reader.u16("information request") for _ in range(count))
    reader.finish()
    return name, wanted


def parse_meta_context(data: bytes) -> tuple[str, list[str]]:
    """Export name and queries, of LIST_META_CONTEXT and SET_META_CONTEXT."""
    reader = _Reader(data)
    name = reader.string("export name")
    count = reader.u32("number of queries")
    if count > c.META_QUERIES_MAX:
        raise OptionError(c.REP_ERR_TOO_BIG, f"{count} queries, at most {c.META_QUERIES_MAX}")
    queries = [reader.string("query") for _ in range(count)]
    reader.finish()
    return name, queries


def match_list(contexts: Sequence[str], queries: Sequence[str]) -> list[str]:
    """The contexts a LIST query names: all without a query, "namespace:" for all of its own."""
    if not queries:
        return list(contexts)
    asked = set(queries)
    return [
        context
        for context in contexts
        if context in asked or context.partition(":")[0] + ":" in asked
    ]


def match_set(contexts: Sequence[str], queries: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """(identifier, name) of each context named in full; anything else selects nothing.

    Identifiers count from 1, so that none looks like the reserved 0 of a listing.
    """
    asked = set(queries)
    return tuple(
        (number, context) for number, context in enumerate(contexts, 1) if context in asked
    )


def information(export: Export, flags: int, wanted: frozenset[int]) -> Iterator[bytes]:
    """The data of each REP_INFO: EXPORT always, the others when asked for."""
    yield _INFO_EXPORT.pack(c.INFO_EXPORT, export.size_bytes, flags)
    if c.INFO_NAME in wanted:
        yield _U16.pack(c.INFO_NAME) + export.name.encode()
    if c.INFO_DESCRIPTION in wanted and export.description:
        yield _U16.pack(c.INFO_DESCRIPTION) + export.description.encode()
    if c.INFO_BLOCK_SIZE in wanted:
        yield _INFO_BLOCK_SIZE.pack(
            c.INFO_BLOCK_SIZE,
            export.minimum_block,
            export.preferred_block,
            export.maximum_payload,
        )


def server_data(export: Export) -> bytes:
    """Data of REP_SERVER: one export in a LIST, name and then description."""
    name = export.name.encode()
    return _U32.pack(len(name)) + name + export.description.encode()


def context_data(identifier: int, name: str) -> bytes:
    """Data of REP_META_CONTEXT."""
    return _U32.pack(identifier) + name.encode()


def reply(option: int, kind: int, data: bytes) -> bytes:
    """One option reply."""
    return _REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data
