"""Virtual time and virtual processes: one event after the other, chosen by time and arrival.

Everything that happens is an event: a call at a time, of one process or of the world (`None`).
Events of a dead process are dropped, those of a stopped one wait. Code that blocks (an opening
volume, work for a thread) runs in a greenlet: where it would wait it switches back to the kernel
and an event switches to it again. There is one source of random numbers, so one seed is one run.

`trace` keeps what processes log and what the world does to them; its running digest tells whether
two runs were the same.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from greenlet import getcurrent, greenlet

TRACE_LINES = 4000

Call = Callable[[], object]
Event = list[Any]
"""time, number, process or None, call or None when it was cancelled"""


class Violation(Exception):
    """The code under test broke a promise."""


class Host:
    """A machine: its clock, whether it runs, how often it was started."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.boots = 1
        self.up = True
        self.rate = 1.0  # of its clock
        self.jumped_seconds = 0.0
        self.wall_jumped_seconds = 0.0

    @property
    def boot_id(self) -> str:
        return f"{self.name}-boot-{self.boots}"


class Process:
    """A process of one host. `at_death` runs when it ends, however it ends."""

    def __init__(self, kernel: Kernel, name: str, host: Host) -> None:
        self.kernel = kernel
        self.name = name
        self.host = host
        self.alive = True
        self.stopped_until = 0.0
        self.greenlets: list[greenlet] = []
        self.threads: list[Thread] = []
        self.at_death: list[Call] = []

    def spawn(self, work: Call) -> None:
        """Run blocking code from now on."""
        self.greenlets = [other for other in self.greenlets if not other.dead]
        new = greenlet(work, self.kernel.hub)
        self.greenlets.append(new)
        self.kernel.at(0.0, self, new.switch)

    def stop_for(self, seconds: float) -> None:
        """Its events wait; it notices nothing but the time."""
        self.stopped_until = max(self.stopped_until, self.kernel.now) + seconds

    def end(self) -> None:
        """It is gone; none of its code runs any more."""
        if not self.alive:
            return
        self.alive = False
        before, self.kernel.current = self.kernel.current, self
        for each in self.greenlets:
            if not each.dead and each is not getcurrent():
                each.throw()
        self.kernel.current = before
        for call in self.at_death:
            call()


class Thread:
    """Work in a worker thread of a process; it may sleep at a disk operation."""

    def __init__(self) -> None:
        self.greenlet: greenlet | None = None
        self.wake: Event | None = None


class Kernel:
    """The queue of events and the clock."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.entropy = Random(seed ^ 0x5EED)
        self.now = 0.0
        self.hub = getcurrent()
        self.current: Process | None = None
        self.events = 0
        self.hidden = ""  # a directory whose name differs from run to run
        self.trace: deque[tuple[float, str, str]] = deque(maxlen=TRACE_LINES)
        self.digest = hashlib.blake2b(digest_size=8)
        self._heap: list[Event] = []
        self._count = 0

    def at(self, delay: float, process: Process | None, call: Call) -> Event:
        """Call it after `delay` seconds, in the name of `process`."""
        return self.at_time(self.now + delay, process, call)

    def at_time(self, when: float, process: Process | None, call: Call) -> Event:
        """Call it at `when`; what is asked for first comes first, if the time is the same."""
        self._count += 1
        event = [when, self._count, process, call]
        heapq.heappush(self._heap, event)
        return event

    def log(self, who: str, message: str) -> None:
        """One line of the trace."""
        if self.hidden:
            message = message.replace(self.hidden, "")
        self.trace.append((self.now, who, message))
        self.digest.update(f"{self.now:.9f} {who} {message}\n".encode())

    def step(self) -> None:
        """Let the next event happen."""
        event = heapq.heappop(self._heap)
        when, _, process, call = event
        if call is None:
            return
        if process is not None:
            if not process.alive:
                return
            if process.stopped_until > when:
                self._count += 1
                event[0], event[1] = process.stopped_until, self._count
                heapq.heappush(self._heap, event)
                return
        self.now = when
        self.current = process
        self.events += 1
        call()
        self.current = None

    def run(self, until: Callable[[], bool], seconds_max: float) -> bool:
        """Go on until the condition holds; False if it does not within the (virtual) time."""
        deadline = self.now + seconds_max
        while not until():
            if not self._heap or self._heap[0][0] > deadline:
                self.now = deadline
                return False
            self.step()
        return True

    # ---- for code that runs in a greenlet -----------------------------------------------------

    def sleep(self, seconds: float, process: Process | None = None) -> None:
        """Block the calling greenlet."""
        self.at(seconds, process or self.current, getcurrent().switch)
        self.pause()

    def pause(self) -> Any:
        """Block the calling greenlet until somebody switches to it."""
        process = self.current
        result = self.hub.switch()
        self.current = process
        return result
