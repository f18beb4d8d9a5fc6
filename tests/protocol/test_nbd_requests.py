"""Proves that the request parser takes bytes apart losslessly within its bounds, and that `check`
gives the error the specification asks for, rule by rule.
"""

from __future__ import annotations

import dataclasses
import struct

import pytest

from protocol.nbd import constants as c
from protocol.nbd.errors import ProtocolViolation
from protocol.nbd.exports import Export
from protocol.nbd.requests import HEADER_BYTES, Request, RequestParser, check, describe

MIB = 1 << 20
EXPORT = Export("vol", 64 * MIB)
READ_ONLY = dataclasses.replace(EXPORT, read_only=True)
SECTORS = dataclasses.replace(EXPORT, minimum_block=512)
CONTEXTS = ((1, c.BASE_ALLOCATION),)
END = EXPORT.size_bytes


def header(command: int, length: int, flags: int = 0, cookie: int = 7, offset: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def parse(parser: RequestParser, data: bytes) -> tuple[list[Request], int]:
    buffer = bytearray(data)
    requests: list[Request] = []
    start = parser.parse(buffer, memoryview(buffer), 0, len(buffer), requests)
    return requests, start


# (why, command, flags, offset, length, export, structured, contexts, expected error)
RULES = [
    ("a read", c.CMD_READ, 0, 0, 4096, EXPORT, False, (), 0),
    ("a read to the last byte", c.CMD_READ, 0, END - 1, 1, EXPORT, False, (), 0),
    ("a read past the end", c.CMD_READ, 0, END - 1, 2, EXPORT, False, (), c.EINVAL),
    ("a read from past the end", c.CMD_READ, 0, END + 1, 0, EXPORT, False, (), c.EINVAL),
    ("the largest offset", c.CMD_READ, 0, 2**64 - 1, 2**32 - 1, EXPORT, False, (), c.EINVAL),
    ("nothing read at the end", c.CMD_READ, 0, END, 0, EXPORT, False, (), 0),
    ("the longest read", c.CMD_READ, 0, 0, 32 * MIB, EXPORT, False, (), 0),
    ("a longer read", c.CMD_READ, 0, 0, 32 * MIB + 1, EXPORT, False, (), c.EOVERFLOW),
    ("a longer DF read", c.CMD_READ, 4, 0, 32 * MIB + 1, EXPORT, True, (), c.EOVERFLOW),
    ("a long read past the end", c.CMD_READ, 0, 32 * MIB, 33 * MIB, EXPORT, 0, (), c.EINVAL),
    ("DF with structured replies", c.CMD_READ, 4, 0, 65536, EXPORT, True, (), 0),
    ("DF without", c.CMD_READ, 4, 0, 65536, EXPORT, False, (), c.EINVAL),
    ("DF on a write", c.CMD_WRITE, 4, 0, 1, EXPORT, True, (), c.EINVAL),
    ("a write", c.CMD_WRITE, 0, 0, 1, EXPORT, False, (), 0),
    ("a write past the end", c.CMD_WRITE, 0, END, 1, EXPORT, False, (), c.ENOSPC),
    ("the longest write", c.CMD_WRITE, 0, 0, 32 * MIB, EXPORT, False, (), 0),
    ("a longer write", c.CMD_WRITE, 0, 0, 32 * MIB + 1, EXPORT, False, (), c.EINVAL),
    ("no write", c.CMD_WRITE, 0, 5, 0, EXPORT, False, (), 0),
    ("a write, read-only", c.CMD_WRITE, 0, 0, 1, READ_ONLY, False, (), c.EPERM),
    ("a write past a read-only end", c.CMD_WRITE, 0, END, 1, READ_ONLY, False, (), c.EPERM),
    ("a flush", c.CMD_FLUSH, 0, 0, 0, EXPORT, False, (), 0),
    ("a flush, read-only", c.CMD_FLUSH, 0, 0, 0, READ_ONLY, False, (), 0),
    ("a flush with an offset", c.CMD_FLUSH, 0, 1, 0, EXPORT, False, (), c.EINVAL),
    ("a flush with a length", c.CMD_FLUSH, 0, 0, 1, EXPORT, False, (), c.EINVAL),
    ("a trim of everything", c.CMD_TRIM, 0, 0, END, EXPORT, False, (), 0),
    ("a trim past the end", c.CMD_TRIM, 0, 0, END + 1, EXPORT, False, (), c.EINVAL),
    ("a trim, read-only", c.CMD_TRIM, 0, 0, 1, READ_ONLY, False, (), c.EPERM),
    ("a trim of nothing", c.CMD_TRIM, 0, 0, 0, EXPORT, False, (), 0),
    ("a cache of everything", c.CMD_CACHE, 0, 0, END, EXPORT, False, (), 0),
    ("a cache past the end", c.CMD_CACHE, 0, 1, END, EXPORT, False, (), c.EINVAL),
    ("a cache, read-only", c.CMD_CACHE, 0, 0, 1, READ_ONLY, False, (), 0),
    ("zeroes everywhere", c.CMD_WRITE_ZEROES, 0, 0, END, EXPORT, False, (), 0),
    ("zeroes past the end", c.CMD_WRITE_ZEROES, 0, 1, END, EXPORT, False, (), c.ENOSPC),
    ("zeroes, read-only", c.CMD_WRITE_ZEROES, 0, 0, 1, READ_ONLY, False, (), c.EPERM),
    ("zeroes, every flag", c.CMD_WRITE_ZEROES, 0b10011, 0, 1, EXPORT, False, (), 0),
    ("status", c.CMD_BLOCK_STATUS, 0, 0, END, EXPORT, True, CONTEXTS, 0),
    ("status, one extent", c.CMD_BLOCK_STATUS, 8, 0, 1, EXPORT, True, CONTEXTS, 0),
    ("status, read-only", c.CMD_BLOCK_STATUS, 0, 0, 1, READ_ONLY, True, CONTEXTS, 0),
    ("status past the end", c.CMD_BLOCK_STATUS, 0, 1, END, EXPORT, True, CONTEXTS, c.EINVAL),
    ("status of nothing", c.CMD_BLOCK_STATUS, 0, 0, 0, EXPORT, True, CONTEXTS, c.EINVAL),
    ("status, no contexts", c.CMD_BLOCK_STATUS, 0, 0, 1, EXPORT, True, (), c.EINVAL),
    ("status, simple replies", c.CMD_BLOCK_STATUS, 0, 0, 1, EXPORT, False, CONTEXTS, c.EINVAL),
    ("a disconnect", c.CMD_DISC, 0, 0, 0, EXPORT, False, (), 0),
    ("an unknown command", 8, 0, 0, 0, EXPORT, True, CONTEXTS, c.EINVAL),
    ("the last command number", 65535, 0, 0, 0, EXPORT, True, CONTEXTS, c.EINVAL),
    ("on a sector", c.CMD_READ, 0, 512, 1024, SECTORS, False, (), 0),
    ("off a sector", c.CMD_READ, 0, 256, 512, SECTORS, False, (), c.EINVAL),
    ("part of a sector", c.CMD_WRITE, 0, 512, 100, SECTORS, False, (), c.EINVAL),
    ("trim off a sector", c.CMD_TRIM, 0, 1, 512, SECTORS, False, (), c.EINVAL),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_a_request_gets_the_error_of_the_specification(rule: tuple) -> None:  # type: ignore[type-arg]
    _, command, flags, offset, length, export, structured, contexts, expected = rule
    assert check(command, flags, offset, length, export, structured, contexts) == expected


def test_every_flag_is_refused_on_every_command_it_is_not_documented_for() -> None:
    documented = {
        (c.CMD_READ, c.CMD_FLAG_DF),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_FAST_ZERO),
        (c.CMD_BLOCK_STATUS, c.CMD_FLAG_REQ_ONE),
    }
    for command in c.COMMAND_NAMES:
        length = 0 if command == c.CMD_FLUSH else 512
        for bit in range(16):
            error = check(command, 1 << bit, 0, length, EXPORT, True, CONTEXTS)
            allowed = bit == 0 or (command, 1 << bit) in documented
            assert error == (0 if allowed else c.EINVAL), (command, bit)


def test_a_refusal_can_name_command_offset_length_and_limits() -> None:
    text = describe(c.CMD_WRITE, 1, END, 4096, READ_ONLY)
    for word in ("WRITE", str(END), "4096", "'vol'", "read-only"):
        assert word in text
    assert "command 99" in describe(99, 0, 0, 0, EXPORT)


def test_all_whole_requests_of_a_batch_come_out_in_order_and_the_rest_stays() -> None:
    whole = (
        header(c.CMD_READ, 4096, cookie=2**64 - 1, offset=2**64 - 1)
        + header(c.CMD_WRITE, 3, flags=1, cookie=2, offset=5)
        + b"abc"
        + header(c.CMD_WRITE, 0, cookie=3)
        + header(c.CMD_FLUSH, 0, cookie=4)
    )
    for rest in (b"", header(c.CMD_WRITE, 5) + b"half", header(c.CMD_TRIM, 1)[:27]):
        requests, start = parse(RequestParser(), whole + rest)
        assert start == len(whole)
        assert requests == [
            (c.CMD_READ, 0, 2**64 - 1, 2**64 - 1, 4096, None),
            (c.CMD_WRITE, 1, 2, 5, 3, b"abc"),
            (c.CMD_WRITE, 0, 3, 0, 0, b""),
            (c.CMD_FLUSH, 0, 4, 0, 0, None),
        ]


def test_a_payload_is_a_slice_of_the_buffer_and_not_a_copy() -> None:
    buffer = bytearray(header(c.CMD_WRITE, 3) + b"abc")
    requests: list[Request] = []
    RequestParser().parse(buffer, memoryview(buffer), 0, len(buffer), requests)
    buffer[-1:] = b"d"
    payload = requests[0][5]
    assert payload is not None
    assert payload.tobytes() == b"abd"


def test_bytes_outside_start_and_end_are_not_looked_at() -> None:
    buffer = bytearray(b"junk" + header(c.CMD_WRITE, 3) + b"abc" + header(c.CMD_READ, 1))
    requests: list[Request] = []
    start = RequestParser().parse(buffer, memoryview(buffer), 4, 4 + 28 + 3 + 27, requests)
    assert (start, len(requests)) == (4 + 28 + 3, 1)
    assert RequestParser().parse(buffer, memoryview(buffer), 4, 4 + 28 + 2, requests) == 4


def test_needed_tells_the_size_of_the_first_incomplete_request() -> None:
    parser = RequestParser(8192)
    for data, expected in (
        (b"", HEADER_BYTES),
        (header(c.CMD_WRITE, 5)[:27], HEADER_BYTES),
        (header(c.CMD_WRITE, 5), HEADER_BYTES + 5),
        (header(c.CMD_WRITE, 8192) + b"a", HEADER_BYTES + 8192),
        (header(c.CMD_READ, 8192), HEADER_BYTES),
    ):
        assert parser.needed(memoryview(b"xx" + data), 2, 2 + len(data)) == expected


@pytest.mark.parametrize("piece_bytes", [1, 27, 28, 1000, 1 << 20])
def test_an_oversized_write_is_skipped_without_a_buffer_and_then_reported(
    piece_bytes: int,
) -> None:
    parser = RequestParser(8192)
    # The payload looks like requests; none of them may come out.
    payload = header(c.CMD_READ, 1, cookie=666) * 400
    data = header(c.CMD_READ, 1, cookie=1) + header(c.CMD_WRITE, len(payload), cookie=2, offset=3)
    data += payload + header(c.CMD_READ, 1, cookie=4)
    requests: list[Request] = []
    kept, longest = b"", 0
    for start in range(0, len(data), piece_bytes):
        found, taken = parse(parser, kept + data[start : start + piece_bytes])
        kept = (kept + data[start : start + piece_bytes])[taken:]
        longest = max(longest, len(kept))
        requests += found
        assert 0 <= parser.draining_bytes <= len(payload)
    assert [(r[0], r[2], r[4], r[5]) for r in requests] == [
        (c.CMD_READ, 1, 1, None),
        (c.CMD_WRITE, 2, len(payload), None),
        (c.CMD_READ, 4, 1, None),
    ]
    assert longest < HEADER_BYTES
    assert (
        check(
            c.CMD_WRITE,
            0,
            3,
            len(payload),
            dataclasses.replace(EXPORT, maximum_payload=8192),
            False,
            (),
        )
        == c.EINVAL
    )


def test_a_write_of_up_to_128_mib_is_skipped_and_a_longer_one_ends_the_connection() -> None:
    parser = RequestParser()
    _, start = parse(parser, header(c.CMD_WRITE, 128 * MIB))
    assert (start, parser.draining_bytes) == (HEADER_BYTES, 128 * MIB)
    with pytest.raises(ProtocolViolation, match=str(128 * MIB + 1)):
        parse(RequestParser(), header(c.CMD_WRITE, 128 * MIB + 1))


def test_requests_before_a_violation_are_delivered() -> None:
    buffer = bytearray(header(c.CMD_READ, 1) + b"GET / HTTP/1.1\r\nHost: example\r\n")
    requests: list[Request] = []
    with pytest.raises(ProtocolViolation, match="0x47455420"):
        RequestParser().parse(buffer, memoryview(buffer), 0, len(buffer), requests)
    assert [request[0] for request in requests] == [c.CMD_READ]


def test_what_follows_a_disconnect_is_not_a_violation() -> None:
    requests, start = parse(RequestParser(), header(c.CMD_DISC, 0) + bytes(100))
    assert [request[0] for request in requests] == [c.CMD_DISC]
    assert start == HEADER_BYTES + 100


def test_plain_reads_are_sorted_out_and_keep_their_order() -> None:
    plain = [(0, 4096), (8192, 65536), (END - 4096, 4096), (4096, 1 << 20)]
    others = [
        header(c.CMD_READ, 4096, offset=END),  # past the end
        header(c.CMD_READ, 8192, offset=END - 4096),
        header(c.CMD_READ, 512, offset=512),  # not whole blocks
        header(c.CMD_READ, 4096, offset=512),
        header(c.CMD_READ, 0, offset=0),
        header(c.CMD_READ, (1 << 20) + 4096, offset=0),  # more than one piece
        header(c.CMD_READ, 4096, flags=c.CMD_FLAG_DF),
        header(c.CMD_FLUSH, 0),
        header(c.CMD_TRIM, 4096, offset=0),
    ]
    data = header(c.CMD_WRITE, 4) + b"data"
    for cookie, (offset, length) in enumerate(plain):
        data += header(c.CMD_READ, length, cookie=cookie, offset=offset) + others[cookie]
    data += b"".join(others[len(plain) :])
    buffer = bytearray(data)
    requests: list[Request] = []
    reads: list[Request] = []
    end = RequestParser().parse(buffer, memoryview(buffer), 0, len(data), requests, reads, END)
    assert end == len(data)
    assert [(cookie, (offset, length)) for _, _, cookie, offset, length, _ in reads] == list(
        enumerate(plain)
    )
    assert [request[0] for request in requests] == [1, 0, 0, 0, 0, 0, 0, 0, 3, 4]
    assert all(request[:2] == (0, 0) and request[5] is None for request in reads)
