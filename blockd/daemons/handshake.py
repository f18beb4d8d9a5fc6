"""Opening a session with a replica daemon: connect, HELLO, PROVE, FENCE, in a blocking way.

Done before the loop runs or in a worker thread; the socket then becomes non-blocking and belongs
to the loop. Both sides prove that they know the volume's key (a keyed hash of both nonces), so a
foreign process on the network can neither serve nor read a volume.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from blockd.loop import Loop
from protocol import replica as wire
from protocol.errors import BlockdError, PeerError, from_code
from replication.watch import WORK_SECONDS_MAX

_HELLO_FIELDS = {
    "replica_uuid": str,
    "volume_uuid": str,
    "size_bytes": int,
    "promised_epoch": int,
    "config_seq": int,
    "complete": bool,
    "boot_id": str,
    "head_id": int,
    "layers": list,
    "position": list,
    "recent": dict,
    "unbroken": bool,
}
TIMEOUT_SECONDS = 5.0  # for each step; a replica answers these from memory


class GivenSession:
    """A session that another process opened and gave to this one; has the shape of `Session`."""

    def __init__(self, address: str, hello: dict[str, Any], sock: socket.socket) -> None:
        self.address = address
        self.hello = hello
        self._socket = sock

    def detach(self) -> socket.socket:
        """The socket, non-blocking, for the loop."""
        self._socket.setblocking(False)
        return self._socket


class Session:
    """A connected, proven session; `hello` is what the replica said of itself."""

    def __init__(self, loop: Loop, address: str, volume_uuid: str, key: bytes) -> None:
        self.address = address
        self._now = loop.now
        self.socket = loop.connect(address, TIMEOUT_SECONDS)
        try:
            self.hello = self._greet(volume_uuid, key)
        except BlockdError:
            self.socket.close()
            raise

    def _greet(self, volume_uuid: str, key: bytes) -> dict[str, Any]:
        ours = os.urandom(wire.NONCE_BYTES).hex()
        hello = self.ask(
            wire.HELLO, {"versions": [wire.VERSION], "volume_uuid": volume_uuid, "nonce": ours}
        )
        theirs = str(hello.get("nonce"))
        self._check(hello)
        expected = wire.proof(key, "replica", ours, theirs, volume_uuid)
        if not wire.same_proof(expected, hello.get("proof")):
            raise PeerError(
                f"the replica at {self.address} does not know the key of this volume; "
                "check --key-file on both sides"
            )
        self.ask(wire.PROVE, {"proof": wire.proof(key, "volume", theirs, ours, volume_uuid)})
        return hello

    def fence(self, content: dict[str, Any]) -> dict[str, Any]:
        """Promise an epoch: the replica drops older sessions and serves this one."""
        try:
            return self._check(self.ask(wire.FENCE, content))
        except BlockdError:
            self.socket.close()
            raise

    def _check(self, hello: dict[str, Any]) -> dict[str, Any]:
        """What a replica says of itself has everything we rely on later."""
        for name, kind in _HELLO_FIELDS.items():
            if not isinstance(hello.get(name), kind):
                raise PeerError(f"the replica at {self.address} does not say its {name}")
        return hello

    def ask(self, operation: int, content: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer; a refusal is raised as the error it names."""
        try:
            self.socket.sendall(wire.json_frame(operation, 0, content))
            answer, payload = self._message()
            deadline = self._now() + WORK_SECONDS_MAX
            while answer == wire.BUSY:  # a flush on a slow disk: it says that it lives
                if self._now() > deadline:
                    raise PeerError(
                        f"the replica at {self.address} is still busy after {WORK_SECONDS_MAX:g} s"
                    )
                answer, payload = self._message()
        except OSError as error:
            raise PeerError(f"the replica at {self.address} went away: {error}") from None
        content = wire.json_content(payload)
        if answer == wire.REFUSED:
            raise from_code(str(content.get("code")), str(content.get("message")))
        return content

    def _message(self) -> tuple[int, memoryview | None]:
        """Operation and payload of the next message."""
        head = self._receive(wire.HEADER_BYTES)
        total = wire.needed(memoryview(head), 0, len(head))
        wire.parse(head, memoryview(head), 0, len(head), [])
        frames: list[wire.Frame] = []
        message = head + self._receive(total - len(head))
        wire.parse(message, memoryview(message), 0, len(message), frames)
        return frames[0][0], frames[0][6]

    def _receive(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self.socket.recv_into(view)
            if not received:
                raise PeerError(f"the replica at {self.address} closed the connection")
            view = view[received:]
        return data

    def detach(self) -> socket.socket:
        """The socket, non-blocking, for the loop."""
        self.socket.setblocking(False)
        return self.socket
