"""Transcripts of the replica wire in text: `tests/golden/replica/*.txt`. `#` begins a comment.

V: 626b6431 01 10 ...   a frame of the volume daemon, in hexadecimal; "..." and '...' are ASCII
                        text and 00*4092 repeats; damage after the last whole frame may follow
R: ...                  a frame of the replica
is: READ length=4096    what the frame before it means; fields not named are 0
end: WireError          the bytes of V end in something that is not the protocol
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from protocol import replica as wire

GOLDEN = Path(__file__).parent.parent / "golden" / "replica"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.txt"))
_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|#.*|\S+""")

Meaning = tuple[int, int, int, int, int, int, int]
"""operation, flags, length, offset, sequence, argument, payload bytes"""


@dataclass
class Line:
    """One frame (or, without a meaning, damage)."""

    side: str
    data: bytes
    meaning: Meaning | None = None


@dataclass
class Transcript:
    """One file."""

    lines: list[Line]
    is_error: bool = False

    def data(self, side: str) -> bytes:
        return b"".join(line.data for line in self.lines if line.side == side)

    def meanings(self, side: str) -> list[Meaning]:
        return [line.meaning for line in self.lines if line.side == side and line.meaning]


def load(name: str) -> Transcript:
    """Read one transcript."""
    transcript = Transcript([])
    for text in (GOLDEN / f"{name}.txt").read_text().splitlines():
        side, _, rest = text.partition(": ")
        tokens = [token for token in _TOKEN.findall(rest) if not token.startswith("#")]
        if text.startswith("#"):
            continue
        if side == "is":
            transcript.lines[-1].meaning = _meaning(tokens)
        elif side == "end":
            assert tokens == ["WireError"]
            transcript.is_error = True
        else:
            assert side in ("V", "R"), text
            transcript.lines.append(Line(side, b"".join(_bytes(token) for token in tokens)))
    return transcript


def _bytes(token: str) -> bytes:
    if token[0] in "\"'":
        return token[1:-1].encode("ascii")
    digits, _, count = token.partition("*")
    return bytes.fromhex(digits) * int(count or 1)


def _meaning(tokens: list[str]) -> Meaning:
    fields = dict(token.split("=") for token in tokens[1:])
    names = ("flags", "length", "offset", "sequence", "argument", "payload")
    assert set(fields) <= set(names), fields
    flags, length, offset, sequence, argument, payload = (int(fields.get(n, 0)) for n in names)
    return getattr(wire, tokens[0]), flags, length, offset, sequence, argument, payload
