"""How fast a rebuild may go: as fast as it can while nobody else is there, and slower than that
while requests wait for it.

The rebuild asks `wait_seconds` before each job and tells what it `moved`. Two things slow it down:
a cap in bytes per second, and the latency of foreground requests, which the engine samples: while
it is above LATENCY_FACTOR times what it was without a rebuild, the rebuild pauses longer and longer
between jobs; below, shorter and shorter.
"""

from __future__ import annotations

from collections.abc import Callable


class Pace:
    """The pace of one rebuild; without arguments it never waits."""

    def __init__(self) -> None:
        self.later: Callable[[float, Callable[[], None]], object] = lambda seconds, call: call()

    def wait_seconds(self) -> float:
        """How long to wait before the next job."""
        return 0.0

    def moved(self, count_bytes: int) -> None:
        """So many bytes were copied."""
