"""Proves that a rebuild slows down for a foreground that waits, runs free when there is none, and
stays under its cap; and that it ends even if the foreground waits all the time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from replication import copyjobs
from replication.pace import (
    FLOOR_SECONDS,
    LATENCY_FACTOR,
    PAUSE_SECONDS_MAX,
    QUIET_SECONDS,
    Latency,
    Pace,
)
from replication.plan import JOB_BLOCKS

USUAL = 0.002


class Bench:
    """A foreground whose latency the test sets, and a rebuild."""

    def __init__(self, cap: float | None = None) -> None:
        self.time = 100.0
        self.cap = cap
        self.latency = Latency(lambda: self.time)
        self.pace = Pace(self.latency, bytes_per_second=lambda: self.cap)
        for _ in range(50):
            self.request(USUAL)
        self.latency.contended = True

    def request(self, seconds: float) -> None:
        began = self.time
        self.time += seconds
        self.latency.sample(began)

    def run(self, seconds: float, latency: float) -> float:
        """Jobs of 1 MiB that take 1 ms each, next to requests; bytes copied per second."""
        end, copied = self.time + seconds, 0
        start = self.time
        while self.time < end:
            self.request(latency)
            self.time += self.pace.wait_seconds() + 0.001
            self.pace.moved(1 << 20)
            copied += 1 << 20
        return copied / (self.time - start)


def test_a_foreground_that_waits_slows_the_rebuild_down_and_it_recovers() -> None:
    bench = Bench()
    free = bench.run(5, USUAL)
    assert bench.pace.wait_seconds() == 0
    slowed = bench.run(5, USUAL * LATENCY_FACTOR * 3)
    assert slowed < free / 5
    assert bench.pace.wait_seconds() == PAUSE_SECONDS_MAX
    bench.run(5, USUAL)
    assert bench.run(5, USUAL) > free * 0.9


def test_without_a_foreground_nothing_waits_even_after_a_bad_time() -> None:
    bench = Bench()
    bench.run(5, USUAL * 10)
    assert bench.pace.wait_seconds() > 0
    bench.time += 2 * QUIET_SECONDS
    assert bench.pace.wait_seconds() == 0


def test_latencies_that_hurt_nobody_are_not_high() -> None:
    bench = Bench()
    bench.latency.usual_seconds = FLOOR_SECONDS / 100
    bench.run(2, FLOOR_SECONDS * 0.9)
    assert bench.pace.wait_seconds() == 0


def test_what_is_usual_is_not_learned_from_a_rebuild() -> None:
    bench = Bench()
    bench.run(20, USUAL * 10)
    assert bench.latency.is_high
    assert bench.latency.usual_seconds == pytest.approx(USUAL)


@pytest.mark.parametrize("cap", [10 << 20, 50 << 20])
def test_the_cap_holds_and_can_be_changed(cap: int) -> None:
    bench = Bench(cap)
    assert bench.run(10, USUAL) == pytest.approx(cap, rel=0.05)
    bench.cap = None
    bench.run(1, USUAL)
    assert bench.run(5, USUAL) > 2 * cap


def test_time_unused_is_not_saved_up_under_a_cap() -> None:
    bench = Bench(10 << 20)
    bench.time += 100
    assert bench.run(10, USUAL) == pytest.approx(10 << 20, rel=0.05)


@pytest.mark.parametrize("users", [True, False])
def test_jobs_are_small_and_one_at_a_time_while_there_are_users(
    users: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    if not users:
        bench.time += 2 * QUIET_SECONDS
    copies: list[Any] = []

    class Copy:
        def __init__(self, jobs: copyjobs.CopyJobs, job: Any) -> None:
            self.job = job

        def start(self) -> None:
            copies.append(self.job)

    monkeypatch.setattr(copyjobs, "_Copy", Copy)
    rebuild: Any = SimpleNamespace(
        pace=bench.pace, engine=None, compared_bytes=0, is_current=lambda attempt: True
    )
    work = [(1, 0, first, JOB_BLOCKS - 1, True) for first in range(0, 8 * JOB_BLOCKS, JOB_BLOCKS)]
    finished: list[bool] = []
    jobs = copyjobs.CopyJobs(rebuild, 1, iter(work), lambda: finished.append(True))
    jobs.pump()
    assert len(copies) == (1 if users else copyjobs.WINDOW)
    at = 0
    while not finished:
        assert len(copies) - at <= copyjobs.WINDOW
        jobs.ended(copies[at][3])
        at += 1
    assert max(count for _, _, _, count, _ in copies) == (
        copyjobs.GENTLE_BLOCKS if users else JOB_BLOCKS - 1
    )
    blocks = [n for _, _, first, count, _ in copies for n in range(first, first + count)]
    assert blocks == [n for _, _, first, count, _ in work for n in range(first, first + count)]


def test_jobs_are_done_one_after_each_pause_while_latencies_stay_high(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    bench.run(2, USUAL * 10)
    later: list[float] = []
    calls: list[Any] = []
    bench.pace.later = lambda seconds, call: (later.append(seconds), calls.append(call))
    done: list[int] = []

    class Copy:
        def __init__(self, jobs: copyjobs.CopyJobs, job: Any) -> None:
            self.jobs = jobs

        def start(self) -> None:
            done.append(len(later))
            self.jobs.ended(1)

    monkeypatch.setattr(copyjobs, "_Copy", Copy)
    rebuild: Any = SimpleNamespace(
        pace=bench.pace, engine=None, compared_bytes=0, is_current=lambda attempt: True
    )
    finished: list[bool] = []
    jobs = copyjobs.CopyJobs(
        rebuild, 1, iter([(1, 0, 0, 1, True)] * 5), lambda: finished.append(True)
    )
    jobs.pump()
    for _ in range(7):
        bench.request(USUAL * 10)
        if calls:
            calls.pop(0)()
    assert done == [1, 2, 3, 4, 5]
    assert set(later) == {PAUSE_SECONDS_MAX}
    assert finished == [True]
