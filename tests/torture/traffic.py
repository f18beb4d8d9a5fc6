"""The client: connections that write, trim, flush and read with several requests under way.

Every answer is checked when it comes (ledger.py). A lost connection is made again until the traffic
is told to stop; what was under way on it is neither done nor undone. An error answer is wrong
unless the fault of the moment allows it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.blockd.nbd_client import FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, NbdClient
from tests.torture.ledger import BLOCK_BYTES, Change, Ledger, Wrong, content_of

IN_FLIGHT_MAX = 16
RUN_BLOCKS_MAX = 12
PAUSE_SECONDS = 0.001  # between requests, so that the daemons and the faults get the machine
ANSWER_SECONDS_MAX = 40.0  # a request without an answer for so long is lost
KINDS = (WRITE, TRIM, WRITE_ZEROES, FLUSH, READ)
WEIGHTS = (55, 10, 6, 3, 26)
NAMES = {WRITE: "write", TRIM: "trim", WRITE_ZEROES: "write zeroes"}

Area = tuple[int, int]
"""first block, block count"""


@dataclass
class Counts:
    """What was answered."""

    writes: int = 0
    trims: int = 0
    reads: int = 0
    flushes: int = 0
    errors: int = 0
    lost: int = 0


@dataclass
class _Under:
    """A request under way."""

    kind: int
    first: int = 0
    count: int = 0
    change: Change | None = None
    since: int = 0


@dataclass
class Traffic:
    """Some connections to one volume, each in a thread of its own."""

    ledger: Ledger
    areas: Sequence[Area]
    where: Callable[[], Path]  # the socket of the moment
    seed: int
    connections: int = 2
    errors_allowed: bool = False
    counts: Counts = field(default_factory=Counts)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{self.seed}/{number}"),))
            for number in range(self.connections)
        ]

    def start(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def abandon(self) -> None:
        """End without a look at what happened: something else is wrong already."""
        self.errors_allowed = True
        self._stopping.set()

    def stop(self) -> None:
        """Ask nothing more, wait for all answers."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS_MAX + 20)
        if self.failures:
            raise self.failures[0]
        if any(thread.is_alive() for thread in self._threads):
            raise Wrong("the client does not end")

    def _run(self, source: random.Random) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    client = NbdClient(self.where())
                except (OSError, LookupError):
                    time.sleep(0.02)
                    continue
                client.socket.settimeout(ANSWER_SECONDS_MAX)
                _Connection(self, client, source).run(self._stopping)
        except BaseException as error:  # told by `stop`
            self.failures.append(error)


class _Connection:
    """One connection until it is lost or the traffic ends."""

    def __init__(self, traffic: Traffic, client: NbdClient, source: random.Random) -> None:
        self._traffic = traffic
        self._ledger = traffic.ledger
        self._client = client
        self._source = source
        self._under: dict[int, _Under] = {}

    def run(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                if len(self._under) < self._source.randint(1, IN_FLIGHT_MAX):
                    self._ask()
                else:
                    self._receive()
                time.sleep(PAUSE_SECONDS)
            while self._under:
                self._receive()
        except TimeoutError:
            waiting = [under.change or under for under in self._under.values()]
            raise Wrong(
                f"no answer within {ANSWER_SECONDS_MAX:g} s to: {'; '.join(map(str, waiting))}"
            ) from None
        except ConnectionError:
            pass
        finally:
            self._client.close()
            for under in self._under.values():
                self._traffic.counts.lost += 1
                if under.change is not None:
                    self._ledger.end(under.change, acknowledged=False)

    def _ask(self) -> None:
        source, client = self._source, self._client
        kind = source.choices(KINDS, WEIGHTS)[0]
        if kind == FLUSH:
            self._under[client.send(FLUSH)] = _Under(kind)
            return
        start, size = source.choice(self._traffic.areas)
        first = start + source.randrange(size)
        count = source.randint(1, min(RUN_BLOCKS_MAX, start + size - first))
        offset, length = first * BLOCK_BYTES, count * BLOCK_BYTES
        if kind == READ:
            since = self._ledger.now()
            self._under[client.send(READ, offset, length)] = _Under(kind, first, count, None, since)
            return
        change = self._ledger.begin(NAMES[kind], first, count, zeros=kind != WRITE)
        under = _Under(kind, first, count, change)
        flags = FUA if source.random() < 0.05 else 0
        data = b""
        if kind == WRITE:
            data = b"".join(content_of(first + at, change.number) for at in range(count))
            length = 0
        elif kind == WRITE_ZEROES and source.random() < 0.3:
            flags |= NO_HOLE
        try:
            cookie = client.send(kind, offset, length, data, flags)
        except OSError:
            self._ledger.end(change, acknowledged=False)
            raise
        self._under[cookie] = under

    def _receive(self) -> None:
        sizes = {
            cookie: under.count * BLOCK_BYTES
            for cookie, under in self._under.items()
            if under.kind == READ
        }
        cookie, error, content = self._client.receive(sizes)
        under = self._under.pop(cookie)
        counts = self._traffic.counts
        if under.change is not None:
            self._ledger.end(under.change, acknowledged=not error)
        if error:
            counts.errors += 1
            if not self._traffic.errors_allowed:
                raise Wrong(f"error {error} for {under.change or under}")
        elif under.kind == READ:
            counts.reads += 1
            self._ledger.check_read(under.first, content, under.since)
        elif under.kind == FLUSH:
            counts.flushes += 1
        elif under.kind == WRITE:
            counts.writes += 1
        else:
            counts.trims += 1
