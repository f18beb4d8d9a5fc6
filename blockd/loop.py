"""The one thread that runs a daemon: epoll, timers, and a way back from worker threads.

Everything a daemon owns is touched by this thread only, so there are no locks. What may take
milliseconds goes to `in_thread`; its result comes back as a callback in the loop.

A `Loop` is also what a daemon knows of its machine: time, connections, which boot this is. Tests
put a virtual one in its place.

Invariants: a handler is called only while its descriptor is registered; callbacks posted from
threads run in the order they were posted; an idle loop sleeps in epoll without a timeout.
"""

from __future__ import annotations

import heapq
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from blockd.daemons import addresses
from snapshots import metadata

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLHUP | select.EPOLLERR
WORKERS_MAX = 4  # one fdatasync, one authority call, two cold reads at a time

Handler = Callable[[int], None]


class Timer:
    """A pending call; `cancel` forgets it."""

    __slots__ = ("call", "due_seconds")

    def __init__(self, due_seconds: float, call: Callable[[], None] | None) -> None:
        self.due_seconds = due_seconds
        self.call = call

    def cancel(self) -> None:
        self.call = None

    def __lt__(self, other: Timer) -> bool:
        return self.due_seconds < other.due_seconds


class Workers:
    """Up to WORKERS_MAX threads, started when there is work for them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0  # submitted and not ended; a guess is good enough to start a thread

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` in one of the threads; called by the loop's thread only."""
        self._queue.put(work)
        self._unfinished += 1
        if len(self._threads) < min(self._unfinished, WORKERS_MAX):
            thread = threading.Thread(target=self._run, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            self._unfinished -= 1

    def end(self) -> None:
        """Finish what was submitted and end the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


class Loop:
    """One epoll loop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._workers = Workers()
        self.running = False
        self.register(self._wake, READ, self._woken)

    def register(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler(events)` whenever `fd` is ready."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Watch `fd` for other events."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget `fd`; unknown descriptors are fine."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    now = staticmethod(time.monotonic)  # seconds

    def sleep(self, seconds: float) -> None:
        """Wait; only before `run`, or in a worker thread."""
        time.sleep(seconds)

    def connect(self, address: str, timeout_seconds: float) -> socket.socket:
        """A blocking connected socket, or PeerError."""
        return addresses.connect(address, timeout_seconds)

    def listen(self, address: str) -> tuple[socket.socket, str]:
        """A non-blocking listening socket and its address."""
        return addresses.listen(address)

    def boot_id(self) -> str:
        """Changes with every boot: what was only in memory is gone then."""
        return metadata.boot_id() or "unknown"

    def later(self, delay_seconds: float, call: Callable[[], None]) -> Timer:
        """Call `call` once, after `delay_seconds`."""
        timer = Timer(self.now() + delay_seconds, call)
        heapq.heappush(self._timers, timer)
        return timer

    def post(self, call: Callable[[], None]) -> None:
        """Call `call` in the loop; safe from any thread and from signal handlers."""
        self._posted.append(call)
        os.eventfd_write(self._wake, 1)

    def in_thread(
        self,
        work: Callable[[], Any],
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Run `work` in a worker thread, then `done(result, error)` in the loop."""

        def run() -> None:
            result: Any = None
            failure: BaseException | None = None
            try:
                result = work()
            except BaseException as error:  # handed to `done`, which knows what it means
                failure = error
            self.post(lambda: done(result, failure))

        self._workers.submit(run)

    def run(self) -> None:
        """Serve until `stop` is called."""
        self.running = True
        handlers, timers, poll, monotonic = (
            self._handlers,
            self._timers,
            self._epoll.poll,
            time.monotonic,
        )
        while self.running:
            # A cancelled timer wakes us once and is dropped then.
            timeout = max(0.0, timers[0].due_seconds - monotonic()) if timers else None
            for fd, events in poll(timeout):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            if timers and timers[0].due_seconds <= monotonic():
                self._run_timers()
        self._workers.end()
        self._run_posted()

    def stop(self) -> None:
        """Leave `run` after the current round."""
        self.running = False
        os.eventfd_write(self._wake, 1)

    def _run_timers(self) -> None:
        now = self.now()
        while self._timers and self._timers[0].due_seconds <= now:
            call = heapq.heappop(self._timers).call
            if call is not None:
                call()

    def _woken(self, events: int) -> None:
        os.eventfd_read(self._wake)
        self._run_posted()

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            self._posted.popleft()()
