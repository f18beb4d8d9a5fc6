"""A virtual network: streams between hosts that are late, stalled, cut, or lose everything.

A stream is two pipes. What is sent arrives after the delay of its link, in order, perhaps in two
parts. A partition holds what arrives back, as TCP does by repeating it; a stream that is held
for too long breaks. `drop` loses what is sent, and the stream breaks later. Links have delays of
their own, so what goes over different links is reordered freely.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent

from blockd.loop import HANGUP, READ, WRITE
from protocol.errors import PeerError
from tests.sim.kernel import Kernel, Process

KEEPALIVE_SECONDS = 11.0  # blockd.daemons.addresses: idle 5 s, then 3 probes every 2 s
FIRST_FD = 1 << 20  # far from real descriptors


class Pipe:
    """One direction of a stream."""

    def __init__(self, network: Network, source: str, target: str) -> None:
        self.network = network
        self.link = (source, target)
        self.end: VirtualSocket | None = None  # who receives
        self.under_way = 0  # bytes that have not arrived
        self.arrives_at = 0.0  # of what was sent last
        self.held: deque[bytes] = deque()  # arrived during a partition
        self.lossy = False

    def send(self, data: bytes) -> None:
        """The bytes travel; b"" is the end of the stream."""
        if self.lossy:
            return
        network = self.network
        kernel = network.kernel
        random = kernel.random
        at = max(kernel.now + network.delay(self.link), self.arrives_at)
        self.under_way += len(data)
        if len(data) > 64 and random.random() < 0.1:
            split = random.randrange(1, len(data))
            head, data = data[:split], data[split:]
            kernel.at_time(at, None, lambda: self._arrive(head))
            at += random.expovariate(1e4)
        self.arrives_at = at
        kernel.at_time(at, None, lambda: self._arrive(data))

    def _arrive(self, data: bytes) -> None:
        if self.lossy:
            return
        if self.held or self.link in self.network.blocked:
            if not self.held:
                self.network.holding.append(self)
                self.network.kernel.at(KEEPALIVE_SECONDS, None, self._still_held)
            self.held.append(data)
        else:
            self._deliver(data)

    def _still_held(self) -> None:
        if self.held and self.end is not None and self.link in self.network.blocked:
            self.end.break_both(errno.ETIMEDOUT)

    def heal(self) -> None:
        """What was held arrives."""
        while self.held:
            self._deliver(self.held.popleft())

    def _deliver(self, data: bytes) -> None:
        end = self.end
        self.under_way -= len(data)
        if end is None or end.closed:
            return
        if data:
            end.inbox.append(data)
            end.unread += len(data)
        else:
            end.at_end = True
        end.poke()
        if end.peer is not None:
            end.peer.poke()  # it may send more


class VirtualSocket:
    """One end of a stream, or a listening socket; has what the daemons use of a socket."""

    family = socket.AF_INET

    def __init__(self, network: Network, process: Process) -> None:
        network.last_fd += 1
        self.fd = network.last_fd
        network.sockets[self.fd] = self
        self.network = network
        self.process = process
        self.peer: VirtualSocket | None = None
        self.pipe: Pipe | None = None  # for what is sent
        self.inbox: deque[bytes] = deque()
        self.unread = 0
        self.at_end = False
        self.broken = 0  # errno
        self.closed = False
        self.accepted: deque[VirtualSocket] = deque()
        self.mask = 0
        self.handler: Callable[[int], None] | None = None
        self._armed = False
        self._waiting: Any = None
        self._timeout: float | None = None
        process.at_death.append(self.close)

    # ---- readiness ----------------------------------------------------------------------------

    def _ready(self) -> int:
        events = 0
        if self.inbox or self.at_end or self.accepted or self.broken:
            events |= READ
        if self.broken:
            events |= HANGUP | WRITE
        elif self.pipe is not None and self._room() > 0:
            events |= WRITE
        return events

    def _room(self) -> int:
        assert self.pipe is not None
        assert self.peer is not None
        return self.network.window_bytes - self.pipe.under_way - self.peer.unread

    def poke(self) -> None:
        """Something changed: wake who waits."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.network.kernel.at(0.0, self.process, waiting.switch)
        elif self.handler is not None and not self._armed and self._ready() & (self.mask | HANGUP):
            self._armed = True
            self.network.kernel.at(0.0, self.process, self._fire)

    def _fire(self) -> None:
        self._armed = False
        events = self._ready() & (self.mask | HANGUP)
        if events and self.handler is not None:
            self.handler(events)
            self.poke()

    # ---- the interface of a socket ------------------------------------------------------------

    def fileno(self) -> int:
        return self.fd

    def setblocking(self, blocking: bool) -> None:
        self._timeout = None

    def settimeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def setsockopt(self, *arguments: object) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return self.process.host.name, 0

    def accept(self) -> tuple[VirtualSocket, Any]:
        if not self.accepted:
            raise BlockingIOError(errno.EAGAIN, "nobody")
        return self.accepted.popleft(), None

    def _check(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        if self.broken:
            raise OSError(self.broken, errno.errorcode[self.broken])

    def sendmsg(self, parts: Sequence[Any]) -> int:
        self._check()
        room = self._room()
        if room <= 0:
            raise BlockingIOError(errno.EAGAIN, "full")
        data = b"".join(parts)
        if len(data) > room:
            data = data[:room]
        assert self.pipe is not None
        self.pipe.send(data)
        return len(data)

    def sendall(self, data: bytes) -> None:
        self._check()
        assert self.pipe is not None
        self.pipe.send(bytes(data))

    def recv_into(self, view: memoryview) -> int:
        if self._timeout is not None:
            self._wait()
        if not self.inbox:
            self._check()
            if self.at_end:
                return 0
            raise BlockingIOError(errno.EAGAIN, "nothing")
        taken = 0
        while self.inbox and taken < len(view):
            data = self.inbox.popleft()
            part = data[: len(view) - taken]
            view[taken : taken + len(part)] = part
            taken += len(part)
            if len(part) < len(data):
                self.inbox.appendleft(data[len(part) :])
        self.unread -= taken
        if self.peer is not None and self.peer.mask & WRITE:
            self.peer.poke()
        return taken

    def _wait(self) -> None:
        """Block until there is something to receive."""
        kernel = self.network.kernel
        timeout = kernel.at(self._timeout or 0.0, None, self._timed_out)
        self._late = False
        while not (self.inbox or self.at_end or self.broken or self.closed or self._late):
            self._waiting = getcurrent()
            kernel.pause()
        timeout[3] = None
        if self._late:
            raise TimeoutError("timed out")

    def _timed_out(self) -> None:
        self._late = True
        self.poke()

    def close(self) -> None:
        """The end of the stream for the peer, as soon as it can know."""
        if self.closed:
            return
        self.closed = True
        self.handler = None
        self.network.sockets.pop(self.fd, None)
        if self.process.alive and self.close in self.process.at_death:
            self.process.at_death.remove(self.close)
        for waiting in self.accepted:
            waiting.close()
        if self.pipe is not None and not self.broken and self.process.host.up:
            self.pipe.send(b"")
        self.network.listeners = {
            address: sock for address, sock in self.network.listeners.items() if sock is not self
        }

    def break_both(self, code: int = errno.ECONNRESET) -> None:
        """The stream is broken for both ends."""
        for end in (self, self.peer):
            if end is not None and not end.broken:
                end.broken = code
                end.poke()


class Network:
    """All hosts' links, listening sockets and streams."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sockets: dict[int, VirtualSocket] = {}
        self.listeners: dict[str, VirtualSocket] = {}
        self.blocked: set[tuple[str, str]] = set()  # directed links between hosts
        self.holding: list[Pipe] = []
        self.slow: dict[tuple[str, str], float] = {}  # extra mean delay of directed links
        self.mean_delay = 1e-4
        self.window_bytes = 4 << 20
        self.last_fd = FIRST_FD

    def delay(self, link: tuple[str, str]) -> float:
        """Of one message on a link."""
        mean = self.mean_delay + self.slow.get(link, 0.0)
        return 2e-5 + self.kernel.random.expovariate(1.0 / mean)

    def listen(self, process: Process, address: str) -> VirtualSocket:
        sock = VirtualSocket(self, process)
        self.listeners[address] = sock
        return sock

    def connect(self, process: Process, address: str, timeout: float) -> VirtualSocket:
        """Blocking; a connected socket or PeerError. Addresses are `tcp:HOST:PORT`."""
        here, there = process.host.name, address.split(":")[1]
        began = self.kernel.now
        while True:
            away = (here, there) in self.blocked or (there, here) in self.blocked
            listener = self.listeners.get(address)
            gone = listener is None and address in self.dark
            if not away and not gone:
                break
            if self.kernel.now - began >= timeout:
                raise PeerError(f"nobody answers at {address}: timed out")
            self.kernel.sleep(0.5, process)
        self.kernel.sleep(self.delay((here, there)), process)
        listener = self.listeners.get(address)
        if listener is None:
            raise PeerError(f"nobody answers at {address}: refused")
        ours, theirs = VirtualSocket(self, process), VirtualSocket(self, listener.process)
        for sock, peer, link in ((ours, theirs, (here, there)), (theirs, ours, (there, here))):
            sock.peer = peer
            sock.pipe = Pipe(self, *link)
            sock.pipe.end = peer
        ours.settimeout(timeout)
        listener.accepted.append(theirs)
        listener.poke()
        return ours

    @property
    def dark(self) -> set[str]:
        """Addresses on hosts without power: nobody even refuses."""
        return self._dark

    _dark: set[str] = set()

    # ---- faults -------------------------------------------------------------------------------

    def between(self, one: str, other: str) -> list[VirtualSocket]:
        """One end of each stream between two hosts, oldest first."""
        return [
            sock
            for sock in self.sockets.values()
            if sock.pipe is not None and sock.pipe.link == (one, other)
        ]

    def block(self, links: Sequence[tuple[str, str]]) -> None:
        """Nothing arrives on these links."""
        self.blocked.update(links)

    def unblock(self, links: Sequence[tuple[str, str]]) -> None:
        """They work again; what TCP kept arrives."""
        self.blocked.difference_update(links)
        for pipe in list(self.holding):
            if pipe.link not in self.blocked:
                self.holding.remove(pipe)
                pipe.heal()

    def lose(self, sock: VirtualSocket, seconds: float) -> None:
        """What is sent on a stream vanishes from now on; it breaks after a while."""
        for end in (sock, sock.peer):
            if end is not None and end.pipe is not None:
                end.pipe.lossy = True
        self.kernel.at(seconds, None, sock.break_both)

    def break_lossy(self) -> None:
        """Streams that lose everything break now."""
        for sock in list(self.sockets.values()):
            if sock.pipe is not None and sock.pipe.lossy:
                sock.break_both()

    def power_lost(self, host: str) -> list[VirtualSocket]:
        """Streams to a host that vanished: the peers hear nothing."""
        ends = [
            sock
            for sock in self.sockets.values()
            if sock.pipe is not None and sock.pipe.link[1] == host
        ]
        for sock in ends:
            self.lose(sock, KEEPALIVE_SECONDS)
        return ends
