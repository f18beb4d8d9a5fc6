"""Replies of the transmission phase, as bytes to put before (never around) the payload.

Called by the volume daemon. Every function returns a header, or a header with a small payload; the
data of a READ follows as a separate buffer in the same sendmsg. Which form a reply must take
("Simple reply message", "Structured reply chunk message"):

- structured replies not negotiated: simple replies only; an error carries no payload.
- negotiated: READ and BLOCK_STATUS never get a simple reply, not even for an error. A READ of
  length 0 is answered with `done_chunk`, since a data chunk may not be empty. Other commands may
  get a simple reply, and do on success because it is shorter.
- every chunk of a reply but the last has done=False.

    simple reply   magic u32 | error u32 | cookie u64
    chunk          magic u32 | flags u16 | type u16 | cookie u64 | payload length u32 | payload
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence

from protocol.nbd import constants as c
from protocol.nbd.requests import Request

_SIMPLE = struct.Struct(">IIQ")
_DATA = struct.Struct(">IHHQIQ")
SIMPLE_HEADER_BYTES = _SIMPLE.size
DATA_HEADER_BYTES = _DATA.size

_pack_simple, _pack_simple_into = _SIMPLE.pack, _SIMPLE.pack_into
_pack_chunk = struct.Struct(">IHHQI").pack
_pack_data, _pack_data_into = _DATA.pack, _DATA.pack_into
_pack_hole = struct.Struct(">IHHQIQI").pack
_pack_error = struct.Struct(">IH").pack
_pack_u64 = struct.Struct(">Q").pack
_pack_u32 = struct.Struct(">I").pack
_pack_extent = struct.Struct(">II").pack

_ERRORS = {
    0: 0,
    errno.EPERM: c.EPERM,
    errno.EACCES: c.EPERM,
    errno.EROFS: c.EPERM,
    errno.EIO: c.EIO,
    errno.EINVAL: c.EINVAL,
    errno.ENOSPC: c.ENOSPC,
    errno.EDQUOT: c.ENOSPC,
    errno.EFBIG: c.ENOSPC,
    errno.EOVERFLOW: c.EINVAL,
    errno.ENOTSUP: c.EINVAL,
    errno.ESHUTDOWN: c.ESHUTDOWN,
}


def error_of(number: int) -> int:
    """The NBD error for an errno of this host; what the protocol has no word for is EIO.

    EOVERFLOW and ENOTSUP are reserved for an over-long READ and for FAST_ZERO ("Error values");
    who means them uses the constants. ENOMEM should not be sent at all and becomes EIO.
    """
    return _ERRORS.get(number, c.EIO)


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A whole reply without data, or the 16 bytes before the data of a READ."""
    return _pack_simple(0x67446698, error, cookie)  # SIMPLE_REPLY_MAGIC


def data_chunk(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    """The 28 bytes before `length` > 0 bytes of data read at `offset`."""
    return _pack_data(0x668E33EF, done, 1, cookie, length + 8, offset)  # OFFSET_DATA


def hole_chunk(cookie: int, offset: int, length: int, done: bool = True) -> bytes:
    """Says that `length` > 0 bytes at `offset` read as zeros."""
    return _pack_hole(0x668E33EF, done, 2, cookie, 12, offset, length)  # OFFSET_HOLE


def block_replies(
    requests: Sequence[Request], cells: memoryview, structured: bool
) -> list[memoryview]:
    """The replies to READs of one block each, with all data; the hot path.

    `cells` has the block of each after room for a header, DATA_HEADER_BYTES, where it is written:
    structured replies then lie there one after the other.
    """
    stride = len(cells) // len(requests)
    at = 0
    if structured:
        for _, _, cookie, offset, length, _ in requests:
            _pack_data_into(cells, at, 0x668E33EF, 1, 1, cookie, length + 8, offset)  # data_chunk
            at += stride
        return [cells]
    replies = []
    for request in requests:
        start = at + DATA_HEADER_BYTES - SIMPLE_HEADER_BYTES
        _pack_simple_into(cells, start, 0x67446698, 0, request[2])  # simple_reply
        at += stride
        replies.append(cells[start:at])
    return replies


def done_chunk(cookie: int) -> bytes:
    """Ends a structured reply without adding anything."""
    return _pack_chunk(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_TYPE_NONE, cookie, 0)


def error_chunk(cookie: int, error: int, message: str = "", done: bool = True) -> bytes:
    """An error about the whole request; nothing of its data may be relied on."""
    assert error
    text = _message(message)
    header = _pack_chunk(c.STRUCTURED_REPLY_MAGIC, done, c.REPLY_TYPE_ERROR, cookie, 6 + len(text))
    return header + _pack_error(error, len(text)) + text


def error_offset_chunk(
    cookie: int, error: int, offset: int, message: str = "", done: bool = True
) -> bytes:
    """An error at `offset`; data chunks that do not cover it stay good."""
    assert error
    text = _message(message)
    header = _pack_chunk(
        c.STRUCTURED_REPLY_MAGIC, done, c.REPLY_TYPE_ERROR_OFFSET, cookie, 14 + len(text)
    )
    return header + _pack_error(error, len(text)) + text + _pack_u64(offset)


def block_status_chunk(
    cookie: int, context_id: int, extents: Iterable[tuple[int, int]], done: bool = True
) -> bytes:
    """The (length, status flags) of consecutive extents, at least one and none empty."""
    descriptors = [_pack_extent(length, status) for length, status in extents if length]
    assert 0 < len(descriptors) <= c.EXTENTS_MAX
    header = _pack_chunk(
        c.STRUCTURED_REPLY_MAGIC,
        done,
        c.REPLY_TYPE_BLOCK_STATUS,
        cookie,
        4 + 8 * len(descriptors),
    )
    return b"".join((header, _pack_u32(context_id), *descriptors))


def error_reply(cookie: int, error: int, structured: bool, message: str = "") -> bytes:
    """The whole reply to a request that failed, in the form the connection uses."""
    if structured:
        return error_chunk(cookie, error, message)
    return _pack_simple(c.SIMPLE_REPLY_MAGIC, error, cookie)


def _message(text: str) -> bytes:
    """UTF-8 of at most STRING_BYTES_MAX bytes, cut at a character."""
    data = text.replace("\0", "").encode(errors="replace")
    if len(data) <= c.STRING_BYTES_MAX:
        return data
    return data[: c.STRING_BYTES_MAX].decode(errors="ignore").encode()
