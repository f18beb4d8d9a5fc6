"""The one thread that runs a daemon: epoll, timers, and a way back from worker threads.

Everything a daemon owns is touched by this thread only, so there are no locks. What may take
milliseconds goes to `in_thread`; its result comes back as a callback in the loop.

Invariants: a handler is called only while its descriptor is registered; callbacks posted from
threads run in the order they were posted; an idle loop sleeps in epoll without a timeout.
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


class Loop:
    """One epoll loop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._workers: ThreadPoolExecutor | None = None
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

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

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
        if self._workers is None:
            self._workers = ThreadPoolExecutor(WORKERS_MAX)

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
        handlers = self._handlers
        poll = self._epoll.poll
        while self.running:
            for fd, events in poll(self._timeout_seconds()):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            if self._timers:
                self._run_timers()
        if self._workers is not None:
            self._workers.shutdown(wait=True)
            self._run_posted()

    def stop(self) -> None:
        """Leave `run` after the current round."""
        self.running = False
        os.eventfd_write(self._wake, 1)

    def _timeout_seconds(self) -> float | None:
        timers = self._timers
        while timers and timers[0].call is None:
            heapq.heappop(timers)
        if not timers:
            return None
        return max(0.0, timers[0].due_seconds - self.now())

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
