"""What the NBD tests share: transcripts in text, and a server on a few bytes of memory.

A transcript is a list of lines, `#` begins a comment:

    C: 00000003                what the client sends, in hexadecimal; "..." is ASCII text and
                               00*124 repeats
    S: 0003e889045565a9 <text> what the server must send; `<text>` is a u32 length and that many
                               bytes of UTF-8, `<error 00000016>` the payload length, error value
                               and message of an error chunk. The wording is left free.
    do: stop                   the server begins to shut down
    end: transmission          the state at the end: negotiating, transmission, closed or
                               violation (the last bytes of the client broke the protocol)

The server keeps 64 KiB in which the second block (4096 to 8191) is full of 0x5a and all else is
a hole. It answers in the plainest way that is right, so that its replies follow from the
specification; it is the model of how handshake, parser, rules and replies fit together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from protocol.nbd import constants as c
from protocol.nbd import replies
from protocol.nbd.exports import Export
from protocol.nbd.handshake import Handshake
from protocol.nbd.requests import Request, RequestParser, check, describe

GOLDEN = Path(__file__).parent.parent / "golden" / "nbd"
SIZE_BYTES = 64 << 10
BLOCK_BYTES = 4096
_TOKEN = re.compile(r'"[^"]*"|<[^>]*>|#.*|\S+')


class Exports:
    """A volume, a snapshot of it, one with small requests only and one with 512-byte sectors."""

    def __init__(self) -> None:
        self.exports = [
            Export("vol", SIZE_BYTES, description="a volume"),
            Export("vol@snap", SIZE_BYTES, read_only=True),
            Export("small", SIZE_BYTES, maximum_payload=8192),
            Export("sector", SIZE_BYTES, minimum_block=512, contexts=("base:allocation", "x-t:a")),
        ]

    def list(self) -> list[str]:
        return [export.name for export in self.exports]

    def find(self, name: str) -> Export | None:
        return next((e for e in self.exports if e.name == (name or "vol")), None)


def new_disk() -> bytearray:
    disk = bytearray(SIZE_BYTES)
    disk[BLOCK_BYTES : 2 * BLOCK_BYTES] = b"\x5a" * BLOCK_BYTES
    return disk


class Server:
    """One connection from the greeting to the end, over memory that connections may share."""

    def __init__(self, disk: bytearray | None = None) -> None:
        self.handshake = Handshake(Exports())
        self.disk = new_disk() if disk is None else disk
        self.parser: RequestParser | None = None
        self.pending = bytearray()
        self.closed = False
        self.stopping = False

    @property
    def state(self) -> str:
        return "closed" if self.closed else self.handshake.state

    def stop(self) -> None:
        self.stopping = self.handshake.stopping = True

    def receive(self, data: bytes) -> bytes:
        """Bytes from the client in, bytes to the client out."""
        if self.closed:
            return b""
        sent = b""
        if self.handshake.state != "transmission":
            sent = self.handshake.receive(data)
            if self.handshake.state != "transmission":
                return sent
            assert self.handshake.export is not None
            self.parser = RequestParser(self.handshake.export.maximum_payload)
            data = self.handshake.leftover
        return sent + self._requests(data)

    def _requests(self, data: bytes) -> bytes:
        assert self.parser is not None
        buffer = self.pending + data
        requests: list[Request] = []
        start = self.parser.parse(buffer, memoryview(buffer), 0, len(buffer), requests)
        self.pending = buffer[start:]
        sent = []
        for request in requests:
            if request[0] == c.CMD_DISC:
                self.closed = True
                break
            sent.append(self._answer(request))
        return b"".join(sent)

    def _answer(self, request: Request) -> bytes:
        command, flags, cookie, offset, length, payload = request
        agreed = self.handshake
        export, structured = agreed.export, agreed.structured_replies
        assert export is not None
        error = check(command, flags, offset, length, export, structured, agreed.contexts)
        if self.stopping:
            error = c.ESHUTDOWN
        if flags == c.CMD_FLAG_FAST_ZERO | c.CMD_FLAG_NO_HOLE and not error:
            error = c.ENOTSUP
        if error:
            text = describe(command, flags, offset, length, export)
            return replies.error_reply(cookie, error, structured, text)
        if command == c.CMD_READ:
            return self._read(cookie, flags, offset, length, structured)
        if command == c.CMD_BLOCK_STATUS:
            return self._status(cookie, flags, offset, length, agreed.contexts)
        if command == c.CMD_WRITE:
            assert payload is not None
            self.disk[offset : offset + length] = payload
        elif command in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self.disk[offset : offset + length] = bytes(length)
        return replies.simple_reply(cookie)

    def _read(self, cookie: int, flags: int, offset: int, length: int, structured: bool) -> bytes:
        data = bytes(self.disk[offset : offset + length])
        if not structured:
            return replies.simple_reply(cookie) + data
        if not length:
            return replies.done_chunk(cookie)
        if flags & c.CMD_FLAG_DF:
            return replies.data_chunk(cookie, offset, length) + data
        sent = []
        extents = self._extents(offset, length)
        for index, (size, status) in enumerate(extents):
            done = index == len(extents) - 1
            if status:
                sent.append(replies.hole_chunk(cookie, offset, size, done))
            else:
                sent.append(replies.data_chunk(cookie, offset, size, done))
                sent.append(bytes(self.disk[offset : offset + size]))
            offset += size
        return b"".join(sent)

    def _status(
        self,
        cookie: int,
        flags: int,
        offset: int,
        length: int,
        contexts: tuple[tuple[int, str], ...],
    ) -> bytes:
        extents = self._extents(offset, length)
        if flags & c.CMD_FLAG_REQ_ONE:
            extents = extents[:1]
        return b"".join(
            replies.block_status_chunk(cookie, identifier, extents, identifier == contexts[-1][0])
            for identifier, _ in contexts
        )

    def _extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, status) of the blocks in a range, equal neighbours joined."""
        extents: list[tuple[int, int]] = []
        stop = offset + length
        while offset < stop:
            finish = min(stop, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
            block = offset // BLOCK_BYTES * BLOCK_BYTES
            hole = not any(self.disk[block : block + BLOCK_BYTES])
            status = c.STATE_HOLE | c.STATE_ZERO if hole else 0
            if extents and extents[-1][1] == status:
                extents[-1] = (extents[-1][0] + finish - offset, status)
            else:
                extents.append((finish - offset, status))
            offset = finish
        return extents


@dataclass
class Turn:
    """What the client sends in one go and what the server must send back."""

    client: bytes = b""
    server: list[str] = field(default_factory=list)
    stop: bool = False


@dataclass
class Transcript:
    """One golden file; the first turn has only the greeting."""

    turns: list[Turn]
    end: str

    @property
    def client_bytes(self) -> bytes:
        return b"".join(turn.client for turn in self.turns)


def load(name: str) -> Transcript:
    """Read a golden file; its name comes without folder and suffix."""
    turns, end, before = [Turn()], "", "S"
    for line in (GOLDEN / f"{name}.txt").read_text().splitlines():
        kind, _, rest = line.partition(":")
        tokens = [token for token in _TOKEN.findall(rest) if not token.startswith("#")]
        if line.startswith("#") or not line.strip():
            continue
        assert kind in ("C", "S", "do", "end"), f"{name}: {line}"
        if kind in ("C", "do") and before == "S":
            turns.append(Turn())
        if kind == "C":
            turns[-1].client += b"".join(map(_bytes, tokens))
        elif kind == "S":
            turns[-1].server += tokens
        elif kind == "do":
            assert tokens == ["stop"]
            turns[-1].stop = True
        else:
            (end,) = tokens
        before = kind
    assert end, f"{name} has no end line"
    return Transcript(turns, end)


def names() -> list[str]:
    """All golden files."""
    return sorted(path.stem for path in GOLDEN.glob("*.txt"))


def match(sent: bytes, tokens: list[str]) -> None:
    """Assert that `sent` is exactly what the tokens describe."""
    position = 0

    def number(size: int) -> int:
        nonlocal position
        position += size
        assert position <= len(sent), f"only {len(sent)} bytes sent"
        return int.from_bytes(sent[position - size : position], "big")

    for token in tokens:
        if token.startswith("<error "):
            length, error, text = number(4), number(4), number(2)
            assert (length, error) == (6 + text, int(token[7:-1], 16))
        elif token == "<text>":
            text = number(4)
        else:
            expected = _bytes(token)
            found = sent[position : position + len(expected)]
            assert found == expected, f"at byte {position} of {sent.hex()}"
            position += len(expected)
            continue
        assert text, "an error should say why"
        sent[position : position + text].decode()
        position += text
    assert position == len(sent), f"more was sent: {sent[position:].hex()}"


def _bytes(token: str) -> bytes:
    if token.startswith('"'):
        return token[1:-1].encode()
    digits, _, times = token.partition("*")
    return bytes.fromhex(digits) * int(times or 1)
