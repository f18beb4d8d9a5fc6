"""Proves that handshake, request parser, rules and replies speak NBD byte for byte, however the
client's bytes are cut: transcripts written from the specification are replayed turn by turn, byte
by byte, and in random pieces across turns.
"""

from __future__ import annotations

import random
import re

import pytest

from protocol.nbd import constants as c
from protocol.nbd.errors import ProtocolViolation
from tests.protocol.nbd_harness import GOLDEN, Server, load, match, names

GOLDEN_NAMES = names()
# Where a violation ends the session, or the server acts between two turns, turns must stay apart.
MIXABLE_NAMES = [
    name
    for name in GOLDEN_NAMES
    if load(name).end != "violation" and not any(turn.stop for turn in load(name).turns)
]


def replay(name: str, piece_bytes: int) -> None:
    transcript = load(name)
    server = Server()
    match(server.handshake.greeting, transcript.turns[0].server)
    for index, turn in enumerate(transcript.turns[1:], 2):
        if turn.stop:
            server.stop()
        sent = b""
        try:
            for start in range(0, len(turn.client), piece_bytes):
                sent += server.receive(turn.client[start : start + piece_bytes])
        except ProtocolViolation:
            assert transcript.end == "violation"
            assert index == len(transcript.turns)
            assert not turn.server
            return
        match(sent, turn.server)
    assert server.state == transcript.end


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_transcript_replays_turn_by_turn(name: str) -> None:
    replay(name, 1 << 30)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_transcript_replays_byte_by_byte(name: str) -> None:
    replay(name, 1)


@pytest.mark.parametrize("name", MIXABLE_NAMES)
def test_a_transcript_replays_in_random_pieces_that_cross_turns(name: str) -> None:
    transcript = load(name)
    data = transcript.client_bytes
    expected = [token for turn in transcript.turns[1:] for token in turn.server]
    generator = random.Random(name)
    for _ in range(10):
        server, sent, start = Server(), b"", 0
        while start < len(data):
            stop = start + generator.choice((1, 3, 16, 17, 28, 100, 5000))
            sent += server.receive(data[start:stop])
            start = stop
        match(sent, expected)
        assert server.state == transcript.end


def found(pattern: str) -> set[int]:
    text = "\n".join((GOLDEN / f"{name}.txt").read_text() for name in GOLDEN_NAMES)
    return {int(number, 16) for number in re.findall(pattern, text, re.MULTILINE)}


def test_the_transcripts_cover_every_option_command_reply_and_error() -> None:
    options = found(r'^C: "IHAVEOPT" ([0-9a-f]{8})')
    assert options >= {value for name, value in vars(c).items() if name.startswith("OPT_")}
    option_replies = found(r"^S: 0003e889045565a9 [0-9a-f]{8} ([0-9a-f]{8})")
    assert option_replies == {value for name, value in vars(c).items() if name.startswith("REP_")}
    assert found(r"^C: 25609513 [0-9a-f]{4} ([0-9a-f]{4})") > set(c.COMMAND_NAMES)
    chunk_types = found(r"^S: 668e33ef [0-9a-f]{4} ([0-9a-f]{4})")
    # ERROR_OFFSET is for a read that fails midway, which memory cannot do: see test_nbd_replies.
    assert chunk_types == {
        value for name, value in vars(c).items() if name.startswith("REPLY_TYPE_")
    } - {c.REPLY_TYPE_ERROR_OFFSET}
    # EIO and ENOMEM are the daemon's to find.
    assert found(r"^S: 67446698 ([0-9a-f]{8})") == {
        0,
        c.EPERM,
        c.EINVAL,
        c.ENOSPC,
        c.EOVERFLOW,
        c.ENOTSUP,
        c.ESHUTDOWN,
    }
