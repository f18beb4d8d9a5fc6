"""Proves that the questions an opening volume daemon asks get their own answers."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, cast

from blockd.daemons.handshake import Session
from protocol import replica as wire


def test_signs_of_life_are_not_taken_for_the_answer() -> None:
    """A flush on a slow disk takes longer than a peer may be silent."""
    ours, theirs = socket.socketpair()
    session = Session.__new__(Session)
    session.address, session.socket = "unix:x", cast(Any, ours)
    session._now = time.monotonic

    def replica() -> None:
        for answer in (wire.FLUSHED, wire.ANSWER):
            if not theirs.recv(1 << 16):
                return
            theirs.sendall(wire.frame(wire.BUSY, 0) * 3)
            content = {"what": answer}
            theirs.sendall(wire.json_frame(answer, 0, content))

    peer = threading.Thread(target=replica)
    peer.start()
    try:
        assert session.ask(wire.FLUSH, {}) == {"what": wire.FLUSHED}
        assert session.ask(wire.CONTROL, {"do": "tree"}) == {"what": wire.ANSWER}
    finally:
        ours.close()
        peer.join()
        theirs.close()
