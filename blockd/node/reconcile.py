"""The work queue: which volume needs a look, and when again.

Level-triggered: an entry says that something about a volume may have changed, not what. A pass
reads all there is and does what is missing, so a lost or doubled entry does no harm. Everything
about one volume (its replicas and snapshots too) is one entry, so that no two threads ever work
on the same volume.

Bounds: at most one entry per volume waits; WORKERS passes run at a time; a volume whose pass fails
comes again after a growing wait of at most BACKOFF_SECONDS_MAX.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable

from blockd.node.context import log
from protocol.errors import BlockdError

WORKERS = 4  # passes wait for daemons and disks, hardly for the processor
BACKOFF_SECONDS_MIN = 0.5
CLOSE_SECONDS = 30.0  # longer than a daemon's start or clean stop, which a pass may wait for
BACKOFF_SECONDS_MAX = 30.0
PASS_SECONDS_MAX = 1200.0  # four of the longest runs of a system tool; what takes longer hangs

# A pass over one volume; returns when the next one is due if nothing happens, None for never.
Pass = Callable[[str], float | None]


class WorkQueue:
    """Volumes and the time each is due; a volume in work is not given out a second time."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._in_work: dict[str, float] = {}  # since when
        self._changed = threading.Condition()
        self._closed = False

    def add(self, name: str, delay_seconds: float = 0.0) -> None:
        """Have a look at `name` at the latest after the delay."""
        due = time.monotonic() + delay_seconds
        with self._changed:
            if due < self._due.get(name, float("inf")):
                self._due[name] = due
                heapq.heappush(self._heap, (due, name))
                self._changed.notify_all()

    def take(self) -> str | None:
        """Wait for a volume that is due; None once the queue is closed."""
        with self._changed:
            while not self._closed:
                wait = self._wait_seconds()
                if wait is not None and wait <= 0:
                    _, name = heapq.heappop(self._heap)
                    del self._due[name]
                    self._in_work[name] = time.monotonic()
                    return name
                self._changed.wait(wait)
            return None

    def done(self, name: str) -> None:
        """The pass over `name` is over."""
        with self._changed:
            self._in_work.pop(name, None)
            if name in self._due:
                heapq.heappush(self._heap, (self._due[name], name))
            self._changed.notify_all()

    def close(self) -> None:
        """Give out nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stuck(self) -> str | None:
        """Which volume has been in work, or has waited for a worker, too long; None if none has."""
        with self._changed:
            now = time.monotonic()
            for name, since in self._in_work.items():
                if now - since > PASS_SECONDS_MAX:
                    return f"the pass over volume {name} has not ended for {now - since:.0f} s"
            wait = self._wait_seconds()
            if wait is not None and -wait > PASS_SECONDS_MAX:
                return f"volume {self._heap[0][1]} has waited for a worker for {-wait:.0f} s"
        return None

    def _wait_seconds(self) -> float | None:
        """Time until the first entry that can be given out; drops what is out of date."""
        while self._heap:
            due, name = self._heap[0]
            # An entry of a volume in work is put back by `done`.
            if self._due.get(name) == due and name not in self._in_work:
                return due - time.monotonic()
            heapq.heappop(self._heap)
        return None


class Workers:
    """Threads that take from the queue and run passes."""

    def __init__(self, queue: WorkQueue, run_pass: Pass) -> None:
        self._queue = queue
        self._pass = run_pass
        self._failures: dict[str, int] = {}
        self._said: dict[str, str] = {}  # a problem that stays is told once
        self._threads = [
            threading.Thread(target=self._run, name=f"reconcile-{number}", daemon=True)
            for number in range(WORKERS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stuck(self) -> str | None:
        """Why no work is done any more, None if all is well."""
        for thread in self._threads:
            if not thread.is_alive():
                return f"thread {thread.name} has ended"
        return self._queue.stuck()

    def close(self) -> None:
        """End after the passes that run now; one that hangs is left behind."""
        self._queue.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (name := self._queue.take()) is not None:
            try:
                delay = self._pass(name)
                self._failures.pop(name, None)
                self._said.pop(name, None)
            except BlockdError as error:
                if self._said.get(name) != str(error):
                    log.warning("volume %s: %s", name, str(error).removeprefix(f"volume {name} "))
                self._said[name] = str(error)
                delay = self._backoff_seconds(name)
            except Exception:  # a bug; the other volumes must go on
                log.exception("volume %s: unexpected error", name)
                delay = self._backoff_seconds(name)
            if delay is not None:
                self._queue.add(name, delay)
            self._queue.done(name)

    def _backoff_seconds(self, name: str) -> float:
        count = self._failures.get(name, 0)
        self._failures[name] = count + 1
        return min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2.0 ** min(count, 10))
