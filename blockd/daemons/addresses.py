"""Addresses of daemons: `unix:PATH`, `tcp:HOST:PORT`, or a bare `HOST:PORT`."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from protocol.errors import ConflictError, PeerError, RequestError

UNIX_PATH_BYTES_MAX = 107  # sun_path of Linux, less the final zero
SOCKET_BUFFER_BYTES = 4 << 20  # a few batches of writes, so that a peer's pause stalls nobody


def parse(address: str) -> tuple[int, str | tuple[str, int]]:
    """(address family, socket address), or RequestError."""
    if address.startswith("unix:"):
        path = address[5:]
        if not path or len(path.encode()) > UNIX_PATH_BYTES_MAX:
            raise RequestError(
                f"socket path {path!r} has {len(path.encode())} bytes; the limit is "
                f"{UNIX_PATH_BYTES_MAX} and it must not be empty; use a shorter path"
            )
        return socket.AF_UNIX, path
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise RequestError(
            f"address {address!r} is not unix:PATH or tcp:HOST:PORT; "
            "examples: unix:/run/r1.sock, tcp:127.0.0.1:9601"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return family, (host, int(port))


def tune(sock: socket.socket) -> None:
    """Large buffers, no Nagle delay."""
    for force, option in ((33, socket.SO_RCVBUF), (32, socket.SO_SNDBUF)):
        try:  # SO_RCVBUFFORCE, SO_SNDBUFFORCE: beyond the system's maximum, if we are root
            sock.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER_BYTES)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def listen(address: str) -> tuple[socket.socket, str]:
    """A non-blocking listening socket and its address (a TCP port 0 becomes a real one)."""
    family, where = parse(address)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if isinstance(where, str):
            _remove_dead_socket(where)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise ConflictError(
            f"cannot listen on {address}: {error.strerror}; choose another address or stop who "
            "uses it"
        ) from None
    if isinstance(where, tuple):
        host, port = sock.getsockname()[:2]
        address = f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
    return sock, address


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """A blocking connected socket, or PeerError."""
    family, where = parse(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout_seconds)
    try:
        sock.connect(where)
    except OSError as error:
        sock.close()
        raise PeerError(
            f"nobody answers at {address}: {error.strerror or error}; is its daemon running?"
        ) from None
    tune(sock)
    return sock


def _remove_dead_socket(path: str) -> None:
    """Unlink a socket file nobody listens on any more; a live one stays and bind fails."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except BlockingIOError:
        return
    except OSError:
        os.unlink(path)
    finally:
        probe.close()


def close(listener: socket.socket) -> None:
    """Stop listening; a unix socket file goes away, if it has not already."""
    name = listener.getsockname()
    listener.close()
    if isinstance(name, str):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
