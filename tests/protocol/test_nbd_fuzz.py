"""Proves that no bytes a client can send do anything but get an answer or end its connection with a
ProtocolViolation; that what is kept in memory stays bounded; and that the answers do not depend
on how the bytes were cut.

Inputs: random bytes, sequences of well-formed pieces, and the golden transcripts with bytes
changed, removed, doubled and inserted.
"""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.nbd import constants as c
from protocol.nbd.errors import ProtocolViolation
from protocol.nbd.requests import HEADER_BYTES
from tests.protocol.nbd_harness import Server, load, names

CORPUS = [data for name in names() if len(data := load(name).client_bytes) < 20_000]
MAGIC_PIECES = [
    b"IHAVEOPT",
    struct.pack(">I", c.REQUEST_MAGIC),
    struct.pack(">I", 3),
    *(struct.pack(">II", option, 0) for option in range(12)),
    *(struct.pack(">HH", flags, command) for command in range(9) for flags in (0, 1, 4, 8)),
    struct.pack(">I", 0xFFFFFFFF),
    struct.pack(">Q", 1 << 63),
    b"vol",
    b"base:allocation",
]
GO_PREFIXES = [
    load(name).turns[1].client + load(name).turns[2].client
    for name in ("info_then_go", "commands_simple", "read_only", "payload_too_long")
] + [load("commands_structured").client_bytes[:45]]


def drive(data: bytes, pieces: list[int]) -> tuple[bytes, str]:
    """Feed `data` cut at `pieces`; what was sent, and how it ended."""
    server = Server()
    sent = b""
    position = 0
    for size in [*pieces, len(data) or 1]:
        piece = data[position : position + size]
        position += size
        try:
            sent += server.receive(piece)
        except ProtocolViolation:
            if server.parser is None:
                assert server.state == "closed"
            return sent, "violation"
        assert len(server.handshake._input) <= c.OPTION_BYTES_MAX + 16
        if server.parser is not None and not server.closed:
            limit = HEADER_BYTES + server.parser.maximum_payload
            assert len(server.pending) < limit
            view = memoryview(bytes(server.pending))
            if not server.parser.draining_bytes:
                assert len(view) < server.parser.needed(view, 0, len(view)) <= limit
    return sent, server.state


def check_any_cut(data: bytes, pieces: list[int]) -> None:
    whole, end = drive(data, [])
    cut, cut_end = drive(data, pieces)
    single, single_end = drive(data, [1] * len(data)) if len(data) < 600 else (cut, cut_end)
    assert end == cut_end == single_end
    # A violation swallows the replies made in the same call, so the shorter is a prefix.
    assert single.startswith(cut)
    assert single.startswith(whole)
    if end != "violation":
        assert whole == cut == single


pieces = st.lists(st.integers(1, 200), max_size=30)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), pieces)
def test_random_bytes(data: bytes, cuts: list[int]) -> None:
    check_any_cut(data, cuts)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.one_of(st.sampled_from(MAGIC_PIECES), st.binary(max_size=12)), max_size=40),
    pieces,
)
def test_random_options(parts: list[bytes], cuts: list[int]) -> None:
    check_any_cut(struct.pack(">I", 3) + b"".join(parts), cuts)


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """An option whose header is right and whose data is anything."""
    strings = st.sampled_from([b"", b"vol", b"sector", b"no", b"base:", b"x-t:a", b"\xff", b"\0"])
    lengths = st.one_of(st.none(), st.integers(0, 20), st.just(2**32 - 1))
    data = b""
    for _ in range(draw(st.integers(0, 4))):
        string, length = draw(strings), draw(lengths)
        data += struct.pack(">I", len(string) if length is None else length) + string
    data += draw(st.binary(max_size=6))
    return b"IHAVEOPT" + struct.pack(">II", draw(st.integers(0, 12)), len(data)) + data


@settings(deadline=None, max_examples=300)
@given(st.lists(options(), max_size=12), pieces)
def test_options_with_any_data(parts: list[bytes], cuts: list[int]) -> None:
    check_any_cut(struct.pack(">I", 3) + b"".join(parts), cuts)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request whose magic is right and all else is anything."""
    command = draw(st.one_of(st.integers(0, 8), st.integers(0, 65535)))
    length = draw(st.sampled_from([0, 1, 512, 4096, 8192, 8193, 65536, 1 << 20]))
    offset = draw(st.one_of(st.integers(0, 70_000), st.integers(0, 2**64 - 1)))
    flags = draw(st.one_of(st.integers(0, 31), st.integers(0, 65535)))
    cookie = draw(st.integers(0, 2**64 - 1))
    head = struct.pack(">IHHQQI", c.REQUEST_MAGIC, flags, command, cookie, offset, length)
    return head + bytes(length if command == c.CMD_WRITE else 0)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(GO_PREFIXES), st.lists(requests(), max_size=8), pieces)
def test_requests_with_any_fields(prefix: bytes, parts: list[bytes], cuts: list[int]) -> None:
    check_any_cut(prefix + b"".join(parts), cuts)


@settings(deadline=None, max_examples=500)
@given(
    st.sampled_from(CORPUS),
    st.lists(
        st.tuples(st.integers(0, 20_000), st.integers(0, 3), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=4,
    ),
    pieces,
)
def test_damaged_transcripts(
    data: bytes, changes: list[tuple[int, int, bytes]], cuts: list[int]
) -> None:
    for position, kind, new in changes:
        at = position % (len(data) + 1)
        if kind == 0:
            data = data[:at] + new + data[at + len(new) :]
        elif kind == 1:
            data = data[:at] + new + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at] + data[max(0, at - 40) :]
    check_any_cut(data, cuts)
