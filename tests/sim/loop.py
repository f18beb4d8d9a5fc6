"""The machine as a daemon sees it: a virtual `blockd.loop.Loop` for each process.

Invariants as there: a handler is called only while its descriptor is registered, posted calls run
in their order, at most WORKERS_MAX threads work at a time. Readiness is level-triggered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet

from blockd.loop import WORKERS_MAX
from tests.sim.kernel import Call, Kernel, Process, Thread

if TYPE_CHECKING:
    from tests.sim.network import Network, VirtualSocket

Done = Callable[[Any, BaseException | None], None]


class VirtualTimer:
    """A pending call."""

    def __init__(self, call: Call) -> None:
        self.call: Call | None = call

    def cancel(self) -> None:
        self.call = None

    def run(self) -> None:
        if self.call is not None:
            self.call()


class VirtualLoop:
    """See the module text."""

    def __init__(self, kernel: Kernel, network: Network, process: Process) -> None:
        self.kernel = kernel
        self.process = process
        self.running = True
        self.on_stop: Call = process.end
        self._network = network
        self._queue: deque[tuple[Callable[[], Any], Done]] = deque()
        self._working = 0

    # ---- descriptors --------------------------------------------------------------------------

    def register(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        sock = self._network.sockets[fd]
        sock.mask, sock.handler = events, handler
        sock.poke()

    def modify(self, fd: int, events: int) -> None:
        sock = self._network.sockets[fd]
        sock.mask = events
        sock.poke()

    def unregister(self, fd: int) -> None:
        sock = self._network.sockets.get(fd)
        if sock is not None:
            sock.handler = None

    def connect(self, address: str, timeout_seconds: float) -> VirtualSocket:
        return self._network.connect(self.process, address, timeout_seconds)

    def listen(self, address: str) -> tuple[VirtualSocket, str]:
        return self._network.listen(self.process, address), address

    # ---- time ---------------------------------------------------------------------------------

    def now(self) -> float:
        host = self.process.host
        return self.kernel.now * host.rate + host.jumped_seconds

    def sleep(self, seconds: float) -> None:
        self.kernel.sleep(seconds / self.process.host.rate, self.process)

    def later(self, delay_seconds: float, call: Call) -> VirtualTimer:
        timer = VirtualTimer(call)
        self.kernel.at(max(0.0, delay_seconds) / self.process.host.rate, self.process, timer.run)
        return timer

    def post(self, call: Call) -> None:
        self.kernel.at(0.0, self.process, call)

    def boot_id(self) -> str:
        return self.process.host.boot_id

    def stop(self) -> None:
        if self.running:
            self.running = False
            self.post(self.on_stop)

    # ---- threads ------------------------------------------------------------------------------

    def in_thread(self, work: Callable[[], Any], done: Done) -> None:
        self._queue.append((work, done))
        self._start()

    def _start(self) -> None:
        while self._queue and self._working < WORKERS_MAX:
            self._working += 1
            work, done = self._queue.popleft()
            thread = Thread()
            thread.greenlet = greenlet(lambda t=thread, w=work, d=done: self._run(t, w, d))
            thread.greenlet.parent = self.kernel.hub
            self.process.threads.append(thread)
            self.process.greenlets.append(thread.greenlet)
            delay = self.kernel.random.expovariate(1e4)
            thread.wake = self.kernel.at(delay, self.process, thread.greenlet.switch)

    def _run(self, thread: Thread, work: Callable[[], Any], done: Done) -> None:
        thread.wake = None
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # handed to `done`, which knows what it means
            failure = error
        self.process.threads.remove(thread)
        self.process.greenlets.remove(getcurrent())
        if self.process.alive:
            self._working -= 1
            self.post(lambda: done(result, failure))
            self._start()


class VirtualEvent:
    """`threading.Event` for a loop that waits for one of its threads: the thread goes on at once.

    Only threads that wait for the disk are waited for in that way.
    """

    kernel: Kernel

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def wait(self) -> None:
        process = self.kernel.current
        assert process is not None
        while not self._is_set:
            thread = next(t for t in process.threads if t.wake is not None)
            assert thread.wake is not None
            assert thread.greenlet is not None
            thread.wake[3] = None
            here = getcurrent()
            # The thread's pauses return to its parent: to us, until it has ended.
            hub, self.kernel.hub = self.kernel.hub, here
            thread.greenlet.parent = here
            thread.greenlet.switch()
            self.kernel.hub = hub
            self.kernel.current = process
            if not thread.greenlet.dead:
                thread.greenlet.parent = hub
