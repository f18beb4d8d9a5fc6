"""Proves that no bytes on any socket of a daemon end it or disturb those who behave.

Every test sends nonsense next to a client that works, and that client must go on working.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.nbd.constants import CONNECTIONS_MAX
from tests.blockd.daemon_harness import Cluster, Daemon, cluster, poll
from tests.blockd.nbd_client import NbdClient

BLOCK = 4096
HELLO = struct.pack(">I", 3)  # client flags: fixed newstyle, no zeroes


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def request(
    command: int, offset: int = 0, length: int = 0, magic: int = 0x25609513, flags: int = 0
) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, command, 7, offset, length)


GO = HELLO + option(7, struct.pack(">I", 3) + b"vol" + struct.pack(">H", 0))
NOISE = random.Random(7)
NONSENSE = {
    "random": NOISE.randbytes(1 << 16),
    "zeros": bytes(1 << 16),
    "ones": b"\xff" * (1 << 16),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "one byte": b"\x00",
    "half hello": HELLO[:2],
    "unknown client flags": struct.pack(">I", 0xFFFFFFFF),
    "no option magic": HELLO + b"IHAVENOT" + bytes(16),
    "endless option": HELLO + option(7, b"", 0xFFFFFFFF) + bytes(1 << 16),
    "half option": HELLO + b"IHAVEOPT" + struct.pack(">I", 7),
    "name longer than the option": HELLO + option(7, struct.pack(">I", 4000) + b"vol"),
    "name that is no text": HELLO + option(7, struct.pack(">I", 3) + b"\xff\xfe\xfd" + bytes(2)),
    "many options": HELLO + option(99) * 5000,
    "wrong request magic": GO + request(0, magic=0x12345678),
    "half request": GO + request(1, 0, BLOCK)[:20],
    "write without its data": GO + request(1, 0, 1 << 20) + bytes(100),
    "write past every bound": GO + request(1, 0, 0xFFFFFFFF) + bytes(1 << 16),
    "noise after GO": GO + NOISE.randbytes(1 << 16),
    "commands nobody knows": GO + b"".join(request(n, 0, 512, flags=0xFFFF) for n in range(8, 99)),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas and one known block; no test here may change it."""
    with cluster(tmp_path_factory.mktemp("garbage"), replicas=2, size="64M") as made:
        client = NbdClient(made.nbd)
        client.write(0, b"k" * BLOCK)
        client.close()
        yield made
        for daemon in (made.volume, *made.replicas):
            assert "Traceback" not in daemon.log.read_text()


def throw(path: Path, data: bytes) -> None:
    """Send bytes, take what comes for a moment, leave without a word."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass


def undisturbed(made: Cluster, client: NbdClient) -> None:
    """Everyone lives, all members are in sync, old and new clients get what is there."""
    for daemon in (made.volume, *made.replicas):
        assert daemon.alive(), daemon.log.read_text()
    status = made.status()
    assert status["health"] == "healthy"
    assert [member["errors"] for member in status["members"]] == [0, 0]
    assert client.read(0, BLOCK) == b"k" * BLOCK
    fresh = NbdClient(made.nbd)
    for _ in range(2):
        assert fresh.read(0, BLOCK) == b"k" * BLOCK
    fresh.close()


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_to_the_nbd_socket_ends_that_connection_only(running: Cluster, what: str) -> None:
    client = NbdClient(running.nbd)
    throw(running.nbd, NONSENSE[what])
    undisturbed(running, client)
    client.close()


@pytest.mark.parametrize("what", ["random", "zeros", "ones", "http", "one byte", "half hello"])
def test_nonsense_to_a_replica_socket_ends_that_connection_only(
    running: Cluster, what: str
) -> None:
    client = NbdClient(running.nbd)
    for number in range(2):
        throw(running.directory / f"r{number}.sock", NONSENSE[what])
    undisturbed(running, client)
    client.close()


def test_random_bytes_in_many_connections_disturb_nobody(running: Cluster) -> None:
    client, source = NbdClient(running.nbd), random.Random(8)
    for _ in range(60):
        data = bytearray(source.choice(list(NONSENSE.values()))[:2000])
        for _ in range(source.randrange(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
        throw(running.nbd, bytes(data))
        throw(running.directory / "r0.sock", bytes(data))
    # Mutated commands may be valid ones: what they did to the volume is theirs, not wrong.
    client.write(0, b"k" * BLOCK)
    undisturbed(running, client)
    client.close()


def dropped_in_time(made: Cluster, path: Path, openings: list[bytes]) -> None:
    """Connections that say this and then nothing are closed, while others are served."""
    client = NbdClient(made.nbd)
    names: dict[int, bytes] = {}
    waiting: dict[int, socket.socket] = {}
    for data in openings:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.sendall(data)
        waiting[sock.fileno()], names[sock.fileno()] = sock, data
    drip = waiting[min(waiting)]

    def all_dropped() -> bool:
        assert client.read(0, BLOCK) == b"k" * BLOCK
        with contextlib.suppress(OSError):
            drip.send(b"\0")  # one byte now and then does not extend the deadline
        for fd in select.select(list(waiting), [], [], 0.1)[0]:
            try:
                ended = not waiting[fd].recv(1 << 16)
            except ConnectionError:
                ended = True
            if ended:
                waiting.pop(fd).close()
        return not waiting

    try:
        poll(f"dropped on {path.name}", all_dropped, seconds=14)
    except AssertionError:
        left = [names[fd] for fd in waiting]
        raise AssertionError(f"still open on {path.name} after 14 s: {left}") from None
    finally:
        for sock in waiting.values():
            sock.close()
    undisturbed(made, client)
    client.close()


def test_a_client_that_never_finishes_the_handshake_is_dropped(running: Cluster) -> None:
    dropped_in_time(running, running.nbd, [b"", HELLO, HELLO + b"IHAVEOPT", HELLO + option(3)])


def test_silent_connections_do_not_shut_the_volume_daemon_out_of_a_replica(
    running: Cluster,
) -> None:
    crowd = []
    running.volume.kill()
    for _ in range(40):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(running.directory / "r0.sock"))
        crowd.append(sock)
    try:
        running.volume.start()
        poll("reachable", lambda: running.member(0)["connected"], seconds=14)
    finally:
        for sock in crowd:
            sock.close()
        poll("reachable", lambda: running.member(0)["connected"])
        for number in range(2):
            if running.member(number)["state"] != "IN_SYNC":
                running.rebuild(number)


def test_connections_over_the_limit_are_refused_and_places_come_back(running: Cluster) -> None:
    poll("everyone left", lambda: running.status()["connections"] == 0)
    taken = [NbdClient(running.nbd) for _ in range(CONNECTIONS_MAX)]
    with pytest.raises((OSError, AssertionError)):
        NbdClient(running.nbd)
    for client in taken:
        assert client.read(0, BLOCK) == b"k" * BLOCK
    for client in taken[1:]:
        client.close()
    poll("places", lambda: running.status()["connections"] == 1)
    undisturbed(running, taken[0])
    taken[0].close()


def test_many_connections_to_a_replica_leave_the_member_alone(running: Cluster) -> None:
    client = NbdClient(running.nbd)
    crowd = []
    for _ in range(300):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(2)
        crowd.append(sock)
        try:
            sock.connect(str(running.directory / "r1.sock"))
        except OSError:
            break
    undisturbed(running, client)
    for sock in crowd:
        sock.close()
    undisturbed(running, client)
    client.close()


CONTROL_NONSENSE: dict[str, bytes] = {
    "no json": b"hello",
    "empty line": b"",
    "a list": b"[1]",
    "null": b"null",
    "no command": b"{}",
    "unknown command": b'{"command": "explode"}',
    "command that is no text": b'{"command": {"a": 1}}',
    "no utf-8": b"\xff\xfe\xfd",
    "nul bytes": bytes(100),
    "deep nesting": b"[" * 200_000,
    "deep nesting inside": b'{"command": "status", "x": ' + b"[" * 200_000,
    "long number": b'{"command": "status", "x": ' + b"9" * 5000 + b"}",
    "half a surrogate": b'{"command": "\\ud800"}',
}
VOLUME_NONSENSE: list[dict[str, Any]] = [
    {"command": "rebuild"},
    {"command": "rebuild", "replica_uuid": "nosuch"},
    {"command": "rebuild", "replica_uuid": ["x"]},
    {"command": "member-remove", "replica_uuid": None},
    {"command": "member-add", "replica_uuid": "x"},
    {
        "command": "member-add",
        "replica_uuid": "7e03aaf8-d13e-4efe-adcf-b138cac78aa5",
        "address": "carrier pigeon",
    },
    {"command": "member-address", "replica_uuid": "x", "address": "unix:/tmp/x"},
    {"command": "snapshot-create"},
    {"command": "snapshot-create", "name": None},
    {"command": "snapshot-create", "name": ["a"]},
    {"command": "snapshot-create", "name": "x", "labels": [1, 2]},
    {"command": "snapshot-create", "name": "x", "labels": {"a": {"b": 1}}},
    {"command": "snapshot-create", "name": "x", "labels": {"a": "b" * 100_000}},
    {"command": "snapshot-create", "name": "half\ud800"},
    {"command": "snapshot-remove"},
    {"command": "snapshot-remove", "name": {"a": 1}},
    {"command": "snapshot-revert", "name": 5},
]


def converse(daemon: Daemon, line: bytes) -> dict[str, Any]:
    """The answer to one raw line; the same connection must then answer `status`."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(daemon.control))
        sock.sendall(line + b'\n{"command": "status"}\n')
        with sock.makefile("rb") as lines:
            answer: dict[str, Any] = json.loads(lines.readline())
            assert json.loads(lines.readline())["ok"]
    return answer


@pytest.mark.parametrize("what", CONTROL_NONSENSE)
def test_a_malformed_control_line_gets_an_error_and_the_next_line_works(
    running: Cluster, what: str
) -> None:
    for daemon in (running.volume, running.replicas[0]):
        answer = converse(daemon, CONTROL_NONSENSE[what])
        if what != "long number":
            assert answer["ok"] is False
            assert answer["code"] in ("bad_request", "not_found"), answer
            assert "\n" not in answer["message"]
            assert len(answer["message"]) < 1000
        assert daemon.alive()


@pytest.mark.parametrize(
    "what", VOLUME_NONSENSE, ids=lambda what: "-".join(map(str, what.values()))[:40]
)
def test_a_control_command_with_bad_arguments_changes_nothing(
    running: Cluster, what: dict[str, Any]
) -> None:
    before = running.status()
    answer = converse(running.volume, json.dumps(what).encode())
    assert answer["ok"] is False, answer
    assert answer["code"] in ("bad_request", "not_found"), answer
    after = running.status()
    assert (after["snapshots"], after["health"]) == (before["snapshots"], "healthy")
    assert [m["replica_uuid"] for m in after["members"]] == [
        m["replica_uuid"] for m in before["members"]
    ]


def test_an_endless_control_line_is_cut_off(running: Cluster) -> None:
    for daemon in (running.volume, running.replicas[0]):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(daemon.control))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(64):
                    sock.sendall(b"x" * (1 << 20))
                pytest.fail("64 MiB of one line were taken")
        assert daemon.must("status")["rss_bytes"] < 64 << 20
        assert os.stat(daemon.control).st_mode & 0o077 == 0
