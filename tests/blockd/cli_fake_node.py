"""A FAKE node service for the tests of the command line: canned answers over real HTTP.

It knows nothing of volumes. A test gives it answers per method and path, and looks at what it was
asked. What the real API answers is tested with the real node service.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Run = Callable[..., tuple[int, str, str]]
"""`blockd` with these words: exit code, stdout, stderr"""


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    authorization: str | None


@dataclass
class FakeNode:
    """Answers by (method, path); a list is worked off, its last answer repeats."""

    answers: dict[tuple[str, str], list[tuple[int, Any]]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def answer(self, method: str, path: str, *bodies: Any, status: int = 200) -> None:
        """Answer `method path` with these bodies, one after the other."""
        self.answers[method, path] = [(status, body) for body in bodies]

    def fail(self, method: str, path: str, status: int, code: str, message: str) -> None:
        """Answer `method path` with an error of the API."""
        self.answer(method, path, {"code": code, "message": message, "retry": False}, status=status)

    def changes(self) -> list[Asked]:
        """The requests that ask for a change."""
        return [asked for asked in self.asked if asked.method != "GET"]


class _Handler(BaseHTTPRequestHandler):
    node: FakeNode

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.node.asked.append(
            Asked(
                method=self.command,
                path=parts.path,
                query={key: values[0] for key, values in parse_qs(parts.query).items()},
                body=json.loads(sent) if sent else None,
                authorization=self.headers.get("Authorization"),
            )
        )
        answers = self.node.answers.get((self.command, parts.path))
        if answers is None:
            message = f"the fake has no answer for {self.command} {parts.path}"
            answers = [(404, {"code": "not_found", "message": message, "retry": False})]
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = do_DELETE = _serve

    def address_string(self) -> str:
        return "fake"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class _TcpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True


@contextmanager
def serving_unix(path: Path) -> Iterator[FakeNode]:
    """A fake on a unix socket at `path`."""
    node = FakeNode()
    handler = type("Handler", (_Handler,), {"node": node})
    with _UnixServer(str(path), handler) as server, _running(server):
        yield node


@contextmanager
def serving_tcp() -> Iterator[tuple[FakeNode, str]]:
    """A fake on a free loopback port, and its URL."""
    node = FakeNode()
    handler = type("Handler", (_Handler,), {"node": node})
    with _TcpServer(("127.0.0.1", 0), handler) as server, _running(server):
        yield node, f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def _running(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join(timeout=5)


def volume_view(**changes: Any) -> dict[str, Any]:
    """A volume as the API shows it, with `changes`."""
    view: dict[str, Any] = {
        "name": "data",
        "uid": "7c0e5f7a-8b30-4d7c-9d55-2f4d1a3e0b11",
        "size_bytes": 10 << 30,
        "allocated_bytes": 1288490188,
        "block_size": 4096,
        "state": "attached",
        "health": "healthy",
        "frontend": "fuse",
        "device": "/dev/loop3",
        "nbd_uri": "nbd+unix:///data?socket=/run/blockd/data.sock",
        "mount": {"path": "/srv/data", "fs": "ext4"},
        "epoch": 4,
        "pid": 4711,
        "message": None,
        "replicas": [
            replica_view("3f2a9c10-0000-4000-8000-000000000001"),
            replica_view("3f2b77de-0000-4000-8000-000000000002"),
            replica_view("a91c44aa-0000-4000-8000-000000000003"),
        ],
        "snapshots": [
            {"name": "monday", "created": "2026-01-05T10:00:00Z", "labels": {"a": "1"}, "id": 1}
        ],
        "head_parent": 1,
        "verify": None,
        "created": "2026-01-05T09:00:00Z",
    }
    return {**view, **changes}


def verify_view(running: bool = False, **changes: Any) -> dict[str, Any]:
    """A verification as the API shows it, with `changes`."""
    report: dict[str, Any] = {
        "running": running,
        "layers": 2,
        "checked_blocks": 512,
        "total_blocks": 1024,
        "bad_blocks": 3,
        "repaired_blocks": 3,
        "unrepaired_blocks": 0,
        "differing_blocks": 0,
        "seconds": 1.5,
        "error": None,
        "members": {"3f2a9c10-0000-4000-8000-000000000001": 3},
    }
    return {**report, **changes}


def replica_view(
    replica_id: str, state: str = "IN_SYNC", fraction: float | None = None
) -> dict[str, Any]:
    """A replica as the API shows it."""
    return {
        "id": replica_id,
        "state": state,
        "address": f"unix:/run/blockd/{replica_id[:8]}.sock",
        "path": f"/var/lib/blockd/replicas/data/{replica_id}",
        "pid": 4712,
        "rebuild": rebuild_view(fraction) if fraction is not None else None,
    }


def rebuild_view(fraction: float, seconds_left: float | None = 200.0) -> dict[str, Any]:
    """A rebuild as the API shows it."""
    return {
        "fraction": fraction,
        "total_bytes": 1 << 30,
        "copied_bytes": int(fraction * (1 << 30)),
        "seconds_left": seconds_left,
    }
