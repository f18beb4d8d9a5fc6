"""Proves the replica wire byte for byte: transcripts whose checksums come from another program are
parsed whole, byte by byte and at random splits, and are made again by the functions that frame.
Anything else than the protocol is a WireError, found before the payload has to be there.
"""

from __future__ import annotations

import itertools
import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import replica as wire
from protocol.checksum import block_checksums, crc32c
from protocol.errors import PeerError
from protocol.streams import INBOX_BYTES, Inbox
from protocol.units import BLOCK_BYTES
from tests.protocol.replica_transcripts import NAMES, Meaning, load

SESSIONS = [name for name in NAMES if not load(name).is_error]
ERRORS = [name for name in NAMES if load(name).is_error]


def parsed(data: bytes) -> list[wire.Frame]:
    buffer = bytearray(data)
    frames: list[wire.Frame] = []
    wire.parse(buffer, memoryview(buffer), 0, len(buffer), frames)
    return frames


def meaning(frame: wire.Frame) -> Meaning:
    return (*frame[:6], len(frame[6]) if frame[6] is not None else 0)


class Receiver:
    """Takes bytes in pieces, the way the owner of a socket does."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.frames: list[tuple[Meaning, bytes]] = []

    def feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.inbox.receive(lambda room, view=view: _copy(room, view)) :]  # type: ignore[misc]
            self._parse()

    def feed_all(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.feed(piece)

    def _parse(self) -> None:
        inbox = self.inbox
        buffer = memoryview(inbox.buffer)
        frames: list[wire.Frame] = []
        start = wire.parse(buffer, buffer, inbox.start, inbox.end, frames)
        self.frames += [(meaning(frame), bytes(frame[6] or b"")) for frame in frames]
        inbox.take(start)
        if inbox.end > inbox.start:
            inbox.reserve(wire.needed(memoryview(inbox.buffer), inbox.start, inbox.end))


def _copy(room: memoryview, data: memoryview) -> int:
    count = min(len(room), len(data))
    room[:count] = data[:count]
    return count


# ---- transcripts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece_bytes", [1 << 30, 1, 39, 40, 41, 4096])
def test_a_transcript_is_understood_in_pieces_of_any_size(name: str, piece_bytes: int) -> None:
    transcript = load(name)
    for side in ("V", "R"):
        receiver = Receiver()
        data = transcript.data(side)
        pieces = [data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes)]
        if side == "V" and transcript.is_error:
            with pytest.raises(wire.WireError):
                receiver.feed_all(pieces)
        else:
            receiver.feed_all(pieces)
        if piece_bytes <= wire.HEADER_BYTES or not transcript.is_error:
            assert [frame for frame, _ in receiver.frames] == transcript.meanings(side)


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize("seed", range(10))
def test_a_transcript_is_understood_at_random_splits(name: str, seed: int) -> None:
    transcript = load(name)
    draw = random.Random(seed)
    for side in ("V", "R"):
        data = transcript.data(side)
        cuts = sorted(draw.randrange(len(data)) for _ in range(draw.randrange(1, 60)))
        receiver = Receiver()
        for start, stop in itertools.pairwise([0, *cuts, len(data)]):
            receiver.feed(data[start:stop])
        assert [frame for frame, _ in receiver.frames] == transcript.meanings(side)
        heads = len(receiver.frames) * wire.HEADER_BYTES
        assert heads + sum(len(payload) for _, payload in receiver.frames) == len(data)


@pytest.mark.parametrize("name", SESSIONS)
def test_a_transcript_is_made_again_by_the_functions_that_frame(name: str) -> None:
    for line in load(name).lines:
        (frame,) = parsed(line.data)
        operation, flags, length, offset, sequence, argument, payload = frame
        size = len(payload) if payload is not None else 0
        made = wire.frame(
            operation,
            sequence,
            length=length,
            offset=offset,
            argument=argument,
            flags=flags,
            payload_bytes=size,
        )
        assert made == line.data[: wire.HEADER_BYTES]
        assert wire.needed(memoryview(line.data), 0, len(line.data)) == len(line.data)
        if operation == wire.WRITE:
            assert payload is not None
            data = payload[4 * (length // BLOCK_BYTES) :]
            assert wire.write_header(sequence, offset, data, argument) + data == line.data
        elif operation == wire.READ:
            assert wire.read_frame(sequence, *wire.read_ranges(payload), argument) == line.data
        elif operation == wire.EXTENT_LIST:
            assert payload is not None
            values = payload.cast("I").tolist()
            runs = [
                (count, bool(data)) for count, data in zip(values[::2], values[1::2], strict=True)
            ]
            assert wire.extents_frame(sequence, runs) == line.data
        elif operation in MAP_OPERATIONS:
            assert payload is not None
            parent_id, first = offset >> 32, offset & 0xFFFFFFFF
            assert wire.place_of(flags, offset, argument) == (argument, parent_id, first, flags)
            place = wire.place(parent_id, first)
            head = wire.map_frame(
                operation, sequence, payload, flags, offset=place, argument=argument
            )
            assert head == line.data[: wire.HEADER_BYTES]
        elif payload is not None and line.data.endswith(b"}") and operation != wire.REFUSED:
            content = json.loads(bytes(payload))
            assert wire.json_frame(operation, sequence, content) == line.data
            assert wire.json_content(payload) == content
        if not flags:
            buffer = bytearray(b"\xff" * 60)
            wire.pack_into(
                buffer,
                7,
                operation,
                sequence,
                length=length,
                offset=offset,
                argument=argument,
                payload_bytes=size,
            )
            assert buffer == b"\xff" * 7 + made + b"\xff" * 13


def test_every_operation_stands_in_a_transcript() -> None:
    named = {
        value
        for name, value in vars(wire).items()
        if name.isupper()
        and name[0] != "_"
        and isinstance(value, int)
        and name not in NOT_OPERATIONS
    }
    seen = {m[0] for name in SESSIONS for side in ("V", "R") for m in load(name).meanings(side)}
    assert named == seen


MAP_OPERATIONS = (wire.LAYER_DATA, wire.LAYER_WRITE, wire.MEND)
NOT_OPERATIONS = {
    *("MAGIC", "VERSION", "HEADER_BYTES", "PAYLOAD_BYTES_MAX", "NONCE_BYTES", "KEEP_ALLOCATED"),
    *("BLOCK_BYTES", "BLOCKS_PER_REGION", "REGION_BYTES", "READS_MAX"),
    *("HEADROOM_BYTES", "CELL_BYTES"),
}


# ---- anything else ------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_incomplete(data: bytes) -> None:
    receiver = Receiver()
    try:
        receiver.feed(data)
    except wire.WireError:
        return
    assert receiver.frames == []
    assert len(data) < wire.HEADER_BYTES


SESSION = load("session").data("V")[:1200]


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(SESSION) - 1), st.integers(1, 255)), min_size=1, max_size=4
    ),
    cut=st.integers(0, len(SESSION)),
    piece_bytes=st.integers(1, 2000),
)
def test_damaged_frames_are_refused_and_memory_stays_bounded(
    flips: list[tuple[int, int]], cut: int, piece_bytes: int
) -> None:
    data = bytearray(SESSION[:cut] + SESSION)
    for position, bits in flips:
        data[position] ^= bits
    receiver = Receiver()
    try:
        for start in range(0, len(data), piece_bytes):
            receiver.feed(data[start : start + piece_bytes])
    except wire.WireError:
        pass
    for _, payload in receiver.frames:
        try:
            wire.json_content(memoryview(payload))
        except wire.WireError:
            continue
    assert receiver.inbox.capacity <= wire.HEADER_BYTES + wire.PAYLOAD_BYTES_MAX + INBOX_BYTES


@pytest.mark.parametrize("bit", range(40 * 8))
def test_each_flipped_bit_of_a_header_is_noticed(bit: int) -> None:
    head = bytearray(wire.frame(wire.READ, 5, length=4096, offset=8192, argument=1))
    head[bit // 8] ^= 1 << bit % 8
    with pytest.raises(wire.WireError):
        parsed(bytes(head))


@pytest.mark.parametrize(
    ("message", "covered_bytes"),
    [
        (wire.read_frame(5, [1, 9], [1, 300], 2), 16),
        (wire.extents_frame(5, [(3, True), (1, False)]), 16),
        (wire.json_frame(wire.CONTROL, 5, {"do": "revert", "layer_id": 3}), 28),
        (wire.refused_frame(5, PeerError("no")), 30),
    ],
)
def test_each_flipped_bit_of_what_no_map_entry_protects_is_noticed(
    message: bytes, covered_bytes: int
) -> None:
    assert len(message) >= wire.HEADER_BYTES + covered_bytes
    parsed(message)
    for bit in range(8 * wire.HEADER_BYTES, 8 * len(message)):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(wire.WireError):
            parsed(bytes(damaged))


@pytest.mark.parametrize("operation", MAP_OPERATIONS)
@pytest.mark.parametrize("count", [2, 3, 1024])
def test_each_flipped_bit_of_map_entries_is_noticed(operation: int, count: int) -> None:
    payload = struct.pack(f"<{count}I", *[0] * (count - 2), 7, 9) + b"d" * (2 * BLOCK_BYTES)
    view = memoryview(payload)
    head = wire.map_frame(operation, 5, view, count, offset=wire.place(2, 1024), argument=3)
    parsed(head + payload)
    for bit in range(0, 8 * 4 * count, 1 if count < 4 else 13):
        damaged = bytearray(head + payload)
        damaged[wire.HEADER_BYTES + bit // 8] ^= 1 << bit % 8
        with pytest.raises(wire.WireError):
            parsed(bytes(damaged))


@pytest.mark.parametrize("size", [0, 4, 7, 12, 8 * wire.READS_MAX + 8])
def test_a_read_of_no_or_half_or_too_many_ranges_is_refused(size: int) -> None:
    with pytest.raises(wire.WireError):
        wire.read_ranges(memoryview(bytes(size)) if size else None)


def test_a_payload_over_the_limit_is_refused_at_its_header() -> None:
    assert parsed(wire.frame(wire.LAYER_WRITE, 1, payload_bytes=wire.PAYLOAD_BYTES_MAX)) == []
    with pytest.raises(wire.WireError, match="limit"):
        parsed(wire.frame(wire.LAYER_WRITE, 1, payload_bytes=wire.PAYLOAD_BYTES_MAX + 1))


def test_the_largest_payload_arrives_in_a_buffer_of_bounded_size() -> None:
    payload = bytes(range(256)) * (wire.PAYLOAD_BYTES_MAX // 256)
    head = wire.map_frame(wire.LAYER_WRITE, 1, memoryview(payload), 1024, offset=0, argument=1)
    message = head + payload
    receiver = Receiver()
    for start in range(0, 2 * len(message), 200_000):
        receiver.feed((message + message)[start : start + 200_000])
    assert [received == payload for _, received in receiver.frames] == [True, True]
    assert receiver.inbox.capacity <= len(message) + INBOX_BYTES


def test_payloads_are_slices_and_not_copies() -> None:
    buffer = bytearray(wire.json_frame(wire.CONTROL, 1, {"a": 1}))
    frames: list[wire.Frame] = []
    wire.parse(buffer, memoryview(buffer), 0, len(buffer), frames)
    payload = frames[0][6]
    assert payload is not None
    buffer[-1] ^= 0xFF
    assert payload[-1] == buffer[-1]


def test_needed_asks_for_a_header_before_it_knows_more() -> None:
    message = wire.json_frame(wire.CONTROL, 1, {"do": "tree"})
    view = memoryview(message)
    for count in range(len(message) + 1):
        expected = wire.HEADER_BYTES if count < wire.HEADER_BYTES else len(message)
        assert wire.needed(view, 0, count) == expected


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b"1",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"a":\xc3}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"{}{}",
    ],
)
def test_a_control_payload_that_is_no_object_is_a_wire_error(payload: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.json_content(memoryview(payload))


def test_an_empty_control_payload_is_an_empty_object() -> None:
    assert wire.json_content(None) == {}


def test_a_control_message_over_the_limit_is_refused_where_it_is_made() -> None:
    with pytest.raises(PeerError, match="limit"):
        wire.json_frame(wire.CONTROL, 1, {"text": "x" * wire.PAYLOAD_BYTES_MAX})


@settings(max_examples=100, deadline=None)
@given(
    operation=st.integers(0, 255),
    flags=st.integers(0, 0xFFFF),
    length=st.integers(0, 0xFFFFFFFF),
    offset=st.integers(0, (1 << 64) - 1),
    sequence=st.integers(0, (1 << 64) - 1),
    argument=st.integers(0, 0xFFFFFFFF),
    payload=st.binary(max_size=50),
)
def test_what_is_framed_is_parsed_again(
    operation: int,
    flags: int,
    length: int,
    offset: int,
    sequence: int,
    argument: int,
    payload: bytes,
) -> None:
    covered = 4 * flags if operation in MAP_OPERATIONS else wire._COVERED[operation]
    if covered and payload:
        length = crc32c(payload[:covered])
    head = wire.frame(
        operation,
        sequence,
        length=length,
        offset=offset,
        argument=argument,
        flags=flags,
        payload_bytes=len(payload),
    )
    (frame,) = parsed(head + payload)
    assert meaning(frame) == (operation, flags, length, offset, sequence, argument, len(payload))
    assert bytes(frame[6] or b"") == payload


@pytest.mark.parametrize("blocks", [1, 2, 256])
def test_a_write_carries_the_entry_of_each_block_in_order(blocks: int) -> None:
    data = b"".join(bytes([number]) * BLOCK_BYTES for number in range(blocks))
    head = wire.write_header(9, 4096, memoryview(data))
    (frame,) = parsed(head + data)
    assert meaning(frame) == (wire.WRITE, 0, len(data), 4096, 9, 0, len(data) + 4 * blocks)
    assert frame[6] is not None
    entries = struct.unpack_from(f"<{blocks}I", frame[6])
    assert list(entries) == block_checksums(memoryview(data))


# ---- the proof of the key -----------------------------------------------------------------------


def test_a_proof_depends_on_everything_it_is_made_of() -> None:
    base = (b"key", "volume", "n1", "n2", "uuid")
    proofs = {wire.proof(*base)}
    for index in range(5):
        changed = list(base)
        changed[index] = b"other" if not index else "other"
        proofs.add(wire.proof(*changed))  # type: ignore[arg-type]
    proofs.add(wire.proof(b"key", "volume", "n2", "n1", "uuid"))
    proofs.add(wire.proof(b"key", "replica", "n1", "n2", "uuid"))
    assert len(proofs) == 8
    assert wire.proof(*base) == wire.proof(*base)


def test_keys_of_any_length_count_to_their_last_byte() -> None:
    for length in (0, 1, 63, 64, 65, 1000):
        key = bytes(length)
        assert wire.proof(key + b"a", "v", "1", "2", "u") != wire.proof(
            key + b"b", "v", "1", "2", "u"
        )
