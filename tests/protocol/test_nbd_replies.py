"""Proves the layout of every reply, field by field against the specification, and that any errno
of the host becomes one of the few error values NBD has.
"""

from __future__ import annotations

import errno
import struct

import pytest

from protocol.nbd import constants as c
from protocol.nbd import replies

COOKIE = 0xFEDCBA9876543210


def test_a_simple_reply_is_magic_error_cookie() -> None:
    assert replies.simple_reply(COOKIE) == bytes.fromhex("67446698 00000000 fedcba9876543210")
    assert replies.simple_reply(1, c.EIO) == bytes.fromhex("67446698 00000005 0000000000000001")


def test_a_data_chunk_counts_the_offset_in_its_length() -> None:
    assert replies.data_chunk(COOKIE, 1 << 40, 4096) == bytes.fromhex(
        "668e33ef 0001 0001 fedcba9876543210 00001008 0000010000000000"
    )
    assert replies.data_chunk(COOKIE, 0, 1, done=False)[4:6] == b"\0\0"


@pytest.mark.parametrize("structured", [False, True])
def test_replies_written_into_the_room_before_blocks_are_those_made_one_by_one(
    structured: bool,
) -> None:
    requests = [
        (c.CMD_READ, 0, COOKIE, 0, 4096, None),
        (c.CMD_READ, 0, 1, 1 << 40, 4096, None),
        (c.CMD_READ, 0, 0, 8192, 4096, None),
    ]
    blocks = [bytes([number]) * 4096 for number in range(3)]
    cells = bytearray(b"".join(b"\xee" * replies.DATA_HEADER_BYTES + block for block in blocks))
    expected = b""
    for (_, _, cookie, offset, length, _), block in zip(requests, blocks, strict=True):
        if structured:
            expected += replies.data_chunk(cookie, offset, length) + block
        else:
            expected += replies.simple_reply(cookie) + block
    made = replies.block_replies(requests, memoryview(cells), structured)
    assert b"".join(made) == expected


def test_a_hole_chunk_carries_offset_and_size() -> None:
    assert replies.hole_chunk(COOKIE, 1 << 40, 1 << 25, done=False) == bytes.fromhex(
        "668e33ef 0000 0002 fedcba9876543210 0000000c 0000010000000000 02000000"
    )


def test_a_done_chunk_is_empty_and_last() -> None:
    assert replies.done_chunk(COOKIE) == bytes.fromhex(
        "668e33ef 0001 0000 fedcba9876543210 00000000"
    )


def test_an_error_chunk_carries_error_and_message() -> None:
    assert replies.error_chunk(COOKIE, c.ENOSPC, "full") == bytes.fromhex(
        "668e33ef 0001 8001 fedcba9876543210 0000000a 0000001c 0004 66756c6c"
    )


def test_an_error_offset_chunk_ends_with_the_offset() -> None:
    assert replies.error_offset_chunk(COOKIE, c.EIO, 0x1234, "bad", done=False) == bytes.fromhex(
        "668e33ef 0000 8002 fedcba9876543210 00000011 00000005 0003 626164 0000000000001234"
    )


def test_a_block_status_chunk_lists_extents_and_drops_empty_ones() -> None:
    assert replies.block_status_chunk(COOKIE, 7, [(4096, 3), (0, 1), (512, 0)]) == bytes.fromhex(
        "668e33ef 0001 0005 fedcba9876543210 00000014 00000007 00001000 00000003 00000200 00000000"
    )


def test_a_block_status_chunk_without_extents_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        replies.block_status_chunk(COOKIE, 7, [])


def test_a_long_message_is_cut_at_4096_bytes_between_characters() -> None:
    chunk = replies.error_chunk(COOKIE, c.EIO, "ä" * 3000 + "\0")
    (length,) = struct.unpack(">H", chunk[24:26])
    assert length == 4096
    assert chunk[26:].decode() == "ä" * 2048
    odd = replies.error_chunk(COOKIE, c.EIO, "a" + "ä" * 3000)
    assert odd[26:].decode() == "a" + "ä" * 2047
    assert b"\0" not in replies.error_chunk(COOKIE, c.EIO, "a\0b")[26:]


def test_a_failed_request_is_answered_in_the_form_the_connection_uses() -> None:
    assert replies.error_reply(1, c.EPERM, False, "no") == replies.simple_reply(1, c.EPERM)
    assert replies.error_reply(1, c.EPERM, True, "no") == replies.error_chunk(1, c.EPERM, "no")


def test_host_errors_become_nbd_errors() -> None:
    expected = {
        0: 0,
        errno.EPERM: c.EPERM,
        errno.EACCES: c.EPERM,
        errno.EROFS: c.EPERM,
        errno.ENOSPC: c.ENOSPC,
        errno.EDQUOT: c.ENOSPC,
        errno.EFBIG: c.ENOSPC,
        errno.EINVAL: c.EINVAL,
        errno.ENOTSUP: c.EINVAL,
        errno.EOVERFLOW: c.EINVAL,
        errno.ESHUTDOWN: c.ESHUTDOWN,
        errno.ENOMEM: c.EIO,
        errno.ECONNRESET: c.EIO,
        99999: c.EIO,
        -1: c.EIO,
    }
    assert {number: replies.error_of(number) for number in expected} == expected
