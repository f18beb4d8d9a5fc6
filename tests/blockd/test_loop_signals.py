"""Proves that a signal ends the loop of a daemon even if a worker thread gets it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from blockd.daemons import process
from blockd.loop import Loop

GIVE_UP_SECONDS = 5.0


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The signal handlers of the test process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_that_another_thread_gets_ends_the_wait() -> None:
    loop = Loop()
    stopped: list[str] = []

    def stop() -> None:
        stopped.append("by the signal")
        loop.stop()

    process.on_signals(loop, stop)
    running = threading.Event()
    loop.post(running.set)

    def send() -> None:
        running.wait(GIVE_UP_SECONDS)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()

    def give_up() -> None:
        stopped.append("too late")
        loop.stop()

    loop.later(GIVE_UP_SECONDS, give_up)
    loop.run()
    thread.join()
    assert stopped == ["by the signal"]
