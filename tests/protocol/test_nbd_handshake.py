"""Proves what transcripts cannot show of the handshake: what is agreed afterwards, what becomes of
bytes that belong to the transmission phase, and that every bound holds.
"""

from __future__ import annotations

import struct

import pytest

from protocol.nbd import constants as c
from protocol.nbd.errors import ProtocolViolation
from protocol.nbd.exports import Export
from protocol.nbd.handshake import Handshake
from tests.protocol.nbd_harness import Exports

CLIENT_FLAGS = struct.pack(">I", 3)
LIST = b"IHAVEOPT" + struct.pack(">II", c.OPT_LIST, 0)
STRUCTURED = b"IHAVEOPT" + struct.pack(">II", c.OPT_STRUCTURED_REPLY, 0)
GO = b"IHAVEOPT" + struct.pack(">III", c.OPT_GO, 9, 3) + b"vol" + bytes(2)


def set_context(export: bytes, *queries: bytes) -> bytes:
    data = struct.pack(">I", len(export)) + export + struct.pack(">I", len(queries))
    data += b"".join(struct.pack(">I", len(query)) + query for query in queries)
    return b"IHAVEOPT" + struct.pack(">II", c.OPT_SET_META_CONTEXT, len(data)) + data


def test_what_was_agreed_can_be_read_afterwards() -> None:
    handshake = Handshake(Exports())
    handshake.receive(CLIENT_FLAGS + STRUCTURED + set_context(b"", b"base:allocation") + GO)
    assert handshake.state == "transmission"
    assert handshake.export == Exports().find("vol")
    assert handshake.structured_replies
    assert handshake.no_zeroes
    # The empty name and "vol" are the same export, so the selection holds.
    assert handshake.contexts == ((1, "base:allocation"),)
    assert handshake.leftover == b""


def test_bytes_after_the_last_option_are_left_over_for_the_transmission() -> None:
    handshake = Handshake(Exports())
    handshake.receive(memoryview(CLIENT_FLAGS + GO[:20]))
    handshake.receive(bytearray(GO[20:] + b"a request"))
    assert handshake.leftover == b"a request"
    with pytest.raises(AssertionError):
        handshake.receive(b"more")


def test_a_context_is_selected_once_however_often_it_is_asked_for() -> None:
    handshake = Handshake(Exports())
    query = set_context(b"vol", *[b"base:allocation"] * 3, b"nonsense", b"")
    sent = handshake.receive(CLIENT_FLAGS + STRUCTURED + query)
    assert handshake.contexts == ((1, "base:allocation"),)
    assert sent.count(b"base:allocation") == 1


def test_a_violation_closes_and_later_bytes_are_ignored() -> None:
    handshake = Handshake(Exports())
    with pytest.raises(ProtocolViolation, match="0x00000004"):
        handshake.receive(struct.pack(">I", 4) + LIST)
    assert handshake.state == "closed"
    assert handshake.receive(LIST) == b""


def test_the_number_of_options_is_bounded() -> None:
    handshake = Handshake(Exports())
    handshake.receive(CLIENT_FLAGS + STRUCTURED * c.OPTIONS_MAX)
    assert handshake.state == "negotiating"
    with pytest.raises(ProtocolViolation, match=str(c.OPTIONS_MAX)):
        handshake.receive(STRUCTURED)


def test_a_lister_may_ask_four_options_for_each_of_255_exports() -> None:
    class Many:
        def list(self) -> list[str]:
            return [f"volume@snapshot-{number:040}" for number in range(255)]

        def find(self, name: str) -> Export:
            return Export(name, 1 << 30)

    handshake = Handshake(Many())
    handshake.receive(CLIENT_FLAGS + STRUCTURED + LIST)
    for name in Many().list():
        data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">HHHH", 3, 1, 2, 3)
        info = b"IHAVEOPT" + struct.pack(">II", c.OPT_INFO, len(data)) + data
        handshake.receive((info + set_context(name.encode(), b"base:allocation")) * 2)
    assert handshake.state == "negotiating"


def test_an_export_that_vanishes_while_it_is_listed_is_left_out() -> None:
    class Racing(Exports):
        def list(self) -> list[str]:
            return ["gone", *super().list()]

    sent = Handshake(Racing()).receive(CLIENT_FLAGS + LIST)
    assert b"gone" not in sent
    assert sent == Handshake(Exports()).receive(CLIENT_FLAGS + LIST)


def test_the_bytes_of_all_replies_are_bounded_so_a_client_that_never_reads_costs_little() -> None:
    class Long:
        def list(self) -> list[str]:
            return ["n" * 4000] * 255

        def find(self, name: str) -> Export:
            return Export(name, 0)

    handshake = Handshake(Long())
    with pytest.raises(ProtocolViolation, match=str(c.HANDSHAKE_REPLY_BYTES_MAX)):
        handshake.receive(CLIENT_FLAGS + LIST * 10)
    assert handshake.state == "closed"


@pytest.mark.parametrize("option", [c.OPT_LIST, c.OPT_INFO, c.OPT_ABORT, 0xDEAD])
def test_data_of_a_long_option_is_not_kept(option: int) -> None:
    handshake = Handshake(Exports())
    length = c.OPTION_DRAIN_BYTES_MAX
    sent = handshake.receive(CLIENT_FLAGS + b"IHAVEOPT" + struct.pack(">II", option, length))
    for _ in range(0, length, 1 << 16):
        assert sent == b""
        sent = handshake.receive(bytes(1 << 16))
        assert len(handshake._input) == 0
    assert sent[8:12] == struct.pack(">I", option)


def test_transmission_flags_say_what_an_export_can_do() -> None:
    base = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_CACHE
    writing = c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO
    assert Export("v", 0).transmission_flags == base | writing | c.FLAG_CAN_MULTI_CONN
    assert (
        Export("v", 0, read_only=True, rotational=True, multi_conn=False).transmission_flags
        == base | c.FLAG_READ_ONLY | c.FLAG_ROTATIONAL
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"minimum_block": 3},
        {"minimum_block": 1 << 17},
        {"preferred_block": 256},
        {"minimum_block": 4096, "preferred_block": 512},
        {"maximum_payload": 1024},
        {"size_bytes": -1},
    ],
    ids=str,
)
def test_an_export_with_block_sizes_the_specification_forbids_is_a_bug(
    wrong: dict[str, int],
) -> None:
    with pytest.raises(AssertionError):
        Export(**{"name": "v", "size_bytes": 0, **wrong})  # type: ignore[arg-type]
