"""Bytes from a client in the transmission phase to requests, and the rules they must keep.

Called by the volume daemon for every batch it receives; this is the hot path. One request is a
plain tuple (command, flags, cookie, offset, length, payload). The payload is a slice of the
caller's buffer, so that part of the buffer must stay as it is until the request is done.

Layout of a request ("Request message"), 28 bytes, then `length` bytes if it is a WRITE:

    magic u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u32

Invariants:
- A WRITE has a payload of exactly `length` bytes if length <= maximum_payload, else None.
- Every other request has payload None.
- 0 <= drain bytes left <= DRAIN_BYTES_MAX; while it is above 0 no request is parsed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from protocol.nbd import constants as c
from protocol.nbd.errors import ProtocolViolation
from protocol.nbd.exports import Export
from protocol.units import PIECE_BYTES_MAX

# (command, flags, cookie, offset, length, payload)
Request = tuple[int, int, int, int, int, memoryview | None]

_HEADER = struct.Struct(">IHHQQI")
HEADER_BYTES = _HEADER.size

_ALLOWED_FLAGS = {
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_DISC: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}
_CHANGING = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))
_GROWING = frozenset((c.CMD_WRITE, c.CMD_WRITE_ZEROES))


class RequestParser:
    """Parses one connection; remembers only how much of an oversized WRITE is still to skip."""

    __slots__ = ("_drained", "draining_bytes", "maximum_payload")

    def __init__(self, maximum_payload: int = c.MAXIMUM_PAYLOAD_BYTES) -> None:
        assert maximum_payload <= c.DRAIN_BYTES_MAX
        self.maximum_payload = maximum_payload
        self.draining_bytes = 0
        self._drained: Request | None = None

    def parse(
        self,
        buffer: bytearray | memoryview,
        view: memoryview,
        start: int,
        end: int,
        requests: list[Request],
        reads: list[Request] | None = None,
        plain_end: int = 0,
    ) -> int:
        """Append every whole request in view[start:end]; return where the unparsed rest begins.

        `view` is a view of `buffer`; payloads are slices of it. Plain READs are appended to `reads`
        in place of `requests`: no flags, whole blocks below byte `plain_end`, at most
        PIECE_BYTES_MAX. They need no check.
        A WRITE above `maximum_payload` is skipped, needs no buffer, and appears (payload None)
        when its last byte has passed; `check` says EINVAL to it. Requests appended before a
        ProtocolViolation is raised are good. The caller stops at a DISC and reads no further.
        """
        if self.draining_bytes:
            start = self._drain(start, end, requests)
        unpack = _HEADER.unpack_from
        append = requests.append
        append_read = append if reads is None else reads.append
        maximum = self.maximum_payload
        last = end - HEADER_BYTES
        while start <= last:
            magic, flags, command, cookie, offset, length = unpack(buffer, start)
            if magic != 0x25609513:  # REQUEST_MAGIC, as a literal for speed
                return _bad_magic(magic, end, requests)
            if command != 1:  # CMD_WRITE, likewise
                start += HEADER_BYTES
                if (
                    command == 0 == flags
                    and offset + length <= plain_end
                    and not (offset | length) & 4095
                    and 0 < length <= PIECE_BYTES_MAX
                ):
                    append_read((0, 0, cookie, offset, length, None))
                else:
                    append((command, flags, cookie, offset, length, None))
            elif length <= maximum:
                data = start + HEADER_BYTES
                finish = data + length
                if finish > end:
                    break
                append((command, flags, cookie, offset, length, view[data:finish]))
                start = finish
            else:
                self._begin_drain((command, flags, cookie, offset, length, None))
                start = self._drain(start + HEADER_BYTES, end, requests)
        return start

    def needed(self, view: memoryview, start: int, end: int) -> int:
        """Bytes from `start` that the first incomplete request takes in all, as far as known."""
        if end - start < HEADER_BYTES:
            return HEADER_BYTES
        _, _, command, _, _, length = _HEADER.unpack_from(view, start)
        if command != c.CMD_WRITE or length > self.maximum_payload:
            return HEADER_BYTES
        return HEADER_BYTES + int(length)

    def skipping(self) -> tuple[int, Request | None]:
        """How much of which oversized WRITE is still to skip; `skip` goes on from there."""
        return self.draining_bytes, self._drained

    def skip(self, draining_bytes: int, request: Request | None) -> None:
        """Go on where another parser of the same connection stopped."""
        self.draining_bytes, self._drained = draining_bytes, request

    def _begin_drain(self, request: Request) -> None:
        length = request[4]
        if length > c.DRAIN_BYTES_MAX:
            raise ProtocolViolation(
                f"WRITE at offset {request[3]} announces {length} bytes; at most "
                f"{self.maximum_payload} are accepted and {c.DRAIN_BYTES_MAX} skipped; "
                "the client must split it"
            )
        self.draining_bytes = length
        self._drained = request

    def _drain(self, start: int, end: int, requests: list[Request]) -> int:
        skipped = min(self.draining_bytes, end - start)
        self.draining_bytes -= skipped
        if not self.draining_bytes:
            assert self._drained is not None
            requests.append(self._drained)
            self._drained = None
        return start + skipped


def pack(request: Request) -> bytes:
    """The bytes `request` came as; not for a WRITE whose payload was skipped."""
    command, flags, cookie, offset, length, payload = request
    assert command != c.CMD_WRITE or payload is not None
    header = _HEADER.pack(c.REQUEST_MAGIC, flags, command, cookie, offset, length)
    return header if payload is None else header + payload


def _bad_magic(magic: int, end: int, requests: list[Request]) -> int:
    """Refuse what is not a request, unless the client has said goodbye before it."""
    if requests and requests[-1][0] == c.CMD_DISC:
        return end
    raise ProtocolViolation(
        f"request magic 0x{magic:08x} is not 0x{c.REQUEST_MAGIC:08x}: "
        "the client is out of step or speaks another protocol"
    )


def check(
    command: int,
    flags: int,
    offset: int,
    length: int,
    export: Export,
    structured: bool,
    contexts: Sequence[tuple[int, str]],
) -> int:
    """0 if the request may be carried out, else the NBD error to answer ("Error values").

    A caller may skip it for a READ or WRITE with flags 0, a writable export, minimum_block
    alignment, 0 < length <= maximum_payload and offset + length <= size_bytes. A request of
    length 0 that passes is answered with success and nothing is done.
    """
    allowed = _ALLOWED_FLAGS.get(command)
    if allowed is None or flags & ~allowed:
        return c.EINVAL
    if flags & c.CMD_FLAG_DF and not structured:
        return c.EINVAL
    if command == c.CMD_DISC:
        return 0
    if command == c.CMD_FLUSH:
        return c.EINVAL if offset or length else 0
    if export.read_only and command in _CHANGING:
        return c.EPERM
    if command == c.CMD_BLOCK_STATUS and not (structured and contexts and length):
        # No contexts were negotiated, or no descriptor could be returned: each needs a length.
        return c.EINVAL
    if command == c.CMD_WRITE and length > export.maximum_payload:
        return c.EINVAL
    if offset + length > export.size_bytes:
        return c.ENOSPC if command in _GROWING else c.EINVAL
    if (offset | length) & (export.minimum_block - 1):
        return c.EINVAL
    if command == c.CMD_READ and length > export.maximum_payload:
        return c.EOVERFLOW
    return 0


def describe(command: int, flags: int, offset: int, length: int, export: Export) -> str:
    """The request in words, for the message of a refusal."""
    name = c.COMMAND_NAMES.get(command, f"command {command}")
    access = "read-only, " if export.read_only else ""
    return (
        f"{name} flags 0x{flags:x} offset {offset} length {length} on export {export.name!r} "
        f"({access}{export.size_bytes} bytes, at most {export.maximum_payload} per request)"
    )
