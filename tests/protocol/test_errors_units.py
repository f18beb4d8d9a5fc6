"""Proves the tables all parts share: error families and their codes, sizes and names, and the block
checksum against an independent implementation and the published test vectors.
"""

from __future__ import annotations

import errno
import random

import crcmod.predefined
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import errors, units
from protocol.checksum import ABSENT, ZEROS, block_checksum, block_checksums
from protocol.errors import BlockdError, RequestError
from protocol.units import BLOCK_BYTES, check_name, check_size, parse_size

ORACLE = crcmod.predefined.mkCrcFun("crc-32c")

# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", errors.FAMILIES.values(), ids=str)
def test_a_family_crosses_the_wire_as_its_code(family: type[BlockdError]) -> None:
    error = errors.from_code(family.code, "a message")
    assert type(error) is family
    assert str(error) == "a message"


def test_no_two_families_share_a_code() -> None:
    assert len(errors.FAMILIES) == 10
    assert all(code == family.code for code, family in errors.FAMILIES.items())


def test_an_unknown_code_is_a_plain_failure() -> None:
    assert type(errors.from_code("from the future", "x")) is BlockdError
    assert type(errors.from_code("", "x")) is BlockdError


@pytest.mark.parametrize(
    ("family", "exit_code"),
    [
        (errors.BlockdError, 1),
        (errors.StorageError, 1),
        (errors.PeerError, 1),
        (errors.StateError, 1),
        (errors.RequestError, 2),
        (errors.NotFoundError, 3),
        (errors.ConflictError, 4),
        (errors.DeadlineError, 5),
        (errors.DegradedError, 6),
    ],
)
def test_exit_codes_are_those_of_the_command_line(
    family: type[BlockdError], exit_code: int
) -> None:
    assert family.exit_code == exit_code
    assert family.errno in errno.errorcode
    assert 400 <= family.http_status < 600


def test_an_errno_of_one_error_does_not_change_its_family() -> None:
    assert errors.StorageError("full", errno=errno.ENOSPC).errno == errno.ENOSPC
    assert errors.StorageError("other").errno == errno.EIO


def test_only_what_may_pass_is_worth_repeating() -> None:
    repeat = {family for family in errors.FAMILIES.values() if family.retry}
    assert errors.ConflictError not in repeat
    assert errors.RequestError not in repeat
    assert {errors.PeerError, errors.StateError, errors.DeadlineError} <= repeat


# ---- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1M", 1 << 20),
        ("1048576", 1 << 20),
        ("1.5G", 3 << 29),
        ("10g", 10 << 30),
        (" 10 GiB ", 10 << 30),
        ("512MB", 512 << 20),
        ("8T", 8 << 40),
        ("8796093022208", 8 << 40),
        ("8796093018112B", (8 << 40) - 4096),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "ten", "-1G", "1 000M", "1GG", "0x100000", "1e9", "1,5G", "nan", "inf", "\u0661M"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="example"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "1023K", "8.001T", "9T", "1048577", "1.0001M", "1" * 40])
def test_a_size_out_of_bounds_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_size(text)


def test_a_size_of_400_digits_is_refused() -> None:
    with pytest.raises(RequestError):
        parse_size("9" * 400)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_size_in_bounds_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except RequestError:
        return
    assert check_size(size) == size


def test_an_uneven_size_is_told_the_next_that_works() -> None:
    with pytest.raises(RequestError, match=str((1 << 20) + 4096)):
        check_size((1 << 20) + 1)


def test_units_fit_each_other() -> None:
    assert units.BLOCKS_PER_REGION * 4 == BLOCK_BYTES  # a map is one block
    assert units.BLOCKS_PER_ZONE == BLOCK_BYTES  # a zone's part of the index is one block
    assert units.REGIONS_PER_ZONE * units.REGION_BYTES == units.ZONE_BYTES
    assert units.SNAPSHOTS_MAX + 1 == 255  # slots of an index byte, 0 aside
    assert units.PIECE_BYTES_MAX % BLOCK_BYTES == 0


# ---- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a.b_c-9", "x" * 63])
def test_a_good_name_passes(name: str) -> None:
    assert check_name("volume", name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", ".a", "a.", "_a", "A", "a b", "a/b", "a@b", "ä", "a\n", "..", "x" * 64, "a\0"],
)
def test_a_bad_name_is_refused_and_named(name: str) -> None:
    with pytest.raises(RequestError, match="volume name"):
        check_name("volume", name)


# ---- checksum ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_published_vectors_hold(data: bytes, crc: int) -> None:
    assert block_checksum(data) == ORACLE(data) == crc


@pytest.mark.parametrize("seed", range(30))
def test_blocks_agree_with_an_independent_implementation(seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(draw.randrange(1, 9) * BLOCK_BYTES)
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    entries = block_checksums(memoryview(data))
    assert entries == [ORACLE(block) for block in blocks]
    assert entries == [block_checksum(kind(block)) for block in blocks for kind in (memoryview,)]


def preimage(crc: int) -> bytes:
    """A block with that CRC: four last bytes found by linear algebra over the bits."""
    base = ORACLE(bytes(BLOCK_BYTES))
    rows = []
    for bit in range(32):
        tail = (1 << bit).to_bytes(4, "little")
        rows.append((ORACLE(bytes(BLOCK_BYTES - 4) + tail) ^ base, 1 << bit))
    wanted, answer = crc ^ base, 0
    for bit in range(32):
        pivot = next(row for row in rows if row[0] >> bit & 1)
        rows = [
            (row[0] ^ pivot[0], row[1] ^ pivot[1]) if row[0] >> bit & 1 else row
            for row in rows
            if row is not pivot
        ]
        if wanted >> bit & 1:
            wanted, answer = wanted ^ pivot[0], answer ^ pivot[1]
    return bytes(BLOCK_BYTES - 4) + answer.to_bytes(4, "little")


@pytest.mark.parametrize(("crc", "entry"), [(0, 4), (1, 5), (2, 6), (3, 7), (4, 4), (8, 8)])
def test_values_set_aside_are_never_the_entry_of_data(crc: int, entry: int) -> None:
    block = preimage(crc)
    assert ORACLE(block) == crc
    assert block_checksum(block) == entry
    assert block_checksums(memoryview(block + block)) == [entry, entry]
    assert entry not in (ABSENT, ZEROS)


def test_no_flipped_bit_makes_an_absent_block_of_zeros_or_the_reverse() -> None:
    for bit in range(32):
        for entry in (ABSENT, ZEROS):
            assert entry ^ 1 << bit not in (ABSENT, ZEROS)
