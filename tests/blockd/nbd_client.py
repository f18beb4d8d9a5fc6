"""A small NBD client for tests: one blocking connection, simple replies, any command."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
FUA, NO_HOLE = 1, 2


class NbdClient:
    """One connection in the transmission phase."""

    def __init__(self, path: Path, export: str = "") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        assert self._receive(16) == b"NBDMAGICIHAVEOPT"
        self._receive(2)
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(data)))
        self.socket.sendall(data)
        self.size = 0
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._receive(20))
            payload = self._receive(length)
            if kind == 3 and payload[:2] == b"\0\0":
                self.size = struct.unpack_from(">Q", payload, 2)[0]
            if kind >> 31:
                raise LookupError(f"export {export!r}: {payload.decode()}")
            if kind == 1:
                break
        self._cookie = 0

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the server closed the connection")
            data += part
        return data

    def send(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> int:
        """Queue one request; its cookie."""
        self._cookie += 1
        self.socket.sendall(
            struct.pack(
                ">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length or len(data)
            )
            + data
        )
        return self._cookie

    def receive(self, sizes: dict[int, int]) -> tuple[int, int, bytes]:
        """The next reply: cookie, error, data (`sizes`: cookie of a READ to its length)."""
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        assert magic == 0x67446698
        data = b"" if error else self._receive(sizes.get(cookie, 0))
        return cookie, error, data

    def run(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> bytes:
        """One request and its reply; OSError with the NBD error number."""
        cookie = self.send(command, offset, length, data, flags)
        answered, error, content = self.receive({cookie: length if command == READ else 0})
        assert answered == cookie
        if error:
            raise OSError(error, f"NBD command {command} at {offset} failed")
        return content

    def read(self, offset: int, length: int) -> bytes:
        return self.run(READ, offset, length)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.run(WRITE, offset, data=data, flags=flags)

    def trim(self, offset: int, length: int) -> None:
        self.run(TRIM, offset, length)

    def flush(self) -> None:
        self.run(FLUSH)

    def close(self) -> None:
        self.socket.close()
