"""How fast a rebuild or scrub may go: as fast as it can while nobody is there, else slower.

`Latency` samples requests of the foreground: one now and then while nothing competes with them,
which gives the usual latency, and one after the other during a rebuild or scrub. `Pace` pauses
between the jobs: longer and longer while requests take more than LATENCY_FACTOR times the usual,
shorter and shorter while they do not. A cap in bytes per second holds besides.
"""

from __future__ import annotations

from collections.abc import Callable

LATENCY_FACTOR = 2.0
FLOOR_SECONDS = 0.0005  # latencies below this are fine whatever the usual one is
QUIET_SECONDS = 0.25  # without a request for so long there is no foreground
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.0005, 0.0125  # 64 KiB each: 5 MiB/s, however slow all is
_USUAL_WEIGHT, _RECENT_WEIGHT = 0.1, 0.3

Later = Callable[[float, Callable[[], None]], object]


class Latency:
    """Samples of foreground requests of one engine."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.wanted = True  # take the next request as a sample
        self.contended = False  # something competes with requests
        self.usual_seconds = 0.0  # 0: not known
        self.recent_seconds = 0.0
        self.last_at = float("-inf")

    def sample(self, began_at: float) -> None:
        """A request that began then has ended."""
        now = self.now()
        seconds = now - began_at
        self.last_at = now
        if not self.contended:
            known = self.usual_seconds or seconds
            self.usual_seconds = known + (seconds - known) * _USUAL_WEIGHT
            self.recent_seconds = 0.0
            return
        known = self.recent_seconds or seconds
        self.recent_seconds = known + (seconds - known) * _RECENT_WEIGHT
        if not self.usual_seconds or self.recent_seconds < self.usual_seconds:
            self.usual_seconds = self.recent_seconds
        self.wanted = True

    @property
    def is_high(self) -> bool:
        """Do requests take much longer than usual?"""
        limit = max(FLOOR_SECONDS, LATENCY_FACTOR * self.usual_seconds)
        return self.recent_seconds > limit

    @property
    def is_quiet(self) -> bool:
        """Was there no request for a while?"""
        return self.now() - self.last_at > QUIET_SECONDS


class Pace:
    """The pace of one rebuild; without arguments it never waits."""

    def __init__(
        self,
        latency: Latency | None = None,
        later: Later = lambda seconds, call: call(),
        bytes_per_second: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.later = later
        self._latency = latency
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0  # when the cap lets more bytes through
        self._pause = 0.0

    @property
    def has_users(self) -> bool:
        """Is there a foreground that may suffer?"""
        return self._latency is not None and not self._latency.is_quiet

    def wait_seconds(self) -> float:
        """How long to wait before the next job."""
        latency = self._latency
        if latency is None:
            return 0.0
        if latency.is_quiet:
            self._pause = 0.0
        elif latency.is_high:
            self._pause = min(PAUSE_SECONDS_MAX, max(PAUSE_SECONDS_MIN, self._pause * 1.5))
        else:
            self._pause *= 0.8
        pause = self._pause if self._pause >= PAUSE_SECONDS_MIN else 0.0
        return max(pause, self._free_at - latency.now())

    def moved(self, count_bytes: int) -> None:
        """So many bytes were copied."""
        cap = self._bytes_per_second()
        if cap and self._latency is not None:
            now = self._latency.now()
            self._free_at = max(now, self._free_at) + count_bytes / cap
