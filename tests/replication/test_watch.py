"""Proves who is put OUT for answering too late, and who is not (issue of judging by the clock): a
member that hangs or lags behind its peers, never one that is as slow as all of them."""

from __future__ import annotations

import errno

import pytest

from protocol import replica as wire
from protocol.units import BLOCK_BYTES
from replication.authority import IN_SYNC, OUT
from replication.watch import (
    ANSWER_SECONDS_MAX,
    LOOK_SECONDS,
    PEERS_FACTOR,
    SLOW_SECONDS,
    WORK_SECONDS_MAX,
    Watch,
)
from tests.replication.world import World

BLOCK = b"\xa5" * BLOCK_BYTES


class Watched:
    """A world with a watch, and the time that passes under its looks."""

    def __init__(self, count: int = 3) -> None:
        self.world = World(count)
        self.watch = Watch(self.world.engine)
        self.world.read(0, BLOCK_BYTES)
        self.world.settle()

    def look(self, seconds: float) -> None:
        """Let time pass; everything due happens between the looks."""
        for _ in range(round(seconds / LOOK_SECONDS)):
            self.world.clock.advance(LOOK_SECONDS)
            self.watch.look(self.world.clock.now())
            self.world.settle()

    def states(self) -> list[str]:
        return [self.world.state(uuid) for uuid in self.world.replicas]


def test_a_member_that_hangs_while_others_applied_a_write_is_out_and_the_write_answered() -> None:
    watched = Watched()
    watched.world.pipes["r1"].stalled = True
    write = watched.world.write(0, BLOCK)
    watched.look(ANSWER_SECONDS_MAX)
    assert watched.states() == [IN_SYNC] * 3
    watched.look(2 * LOOK_SECONDS)
    assert watched.states() == [IN_SYNC, OUT, IN_SYNC]
    assert write.error == 0
    watched.world.check_members()


def test_answers_to_other_requests_do_not_save_a_member_that_owes_a_write() -> None:
    watched = Watched(2)
    watched.world.pipes["r1"].stalled = True
    watched.world.write(0, BLOCK)
    link = watched.world.link("r1")
    for _ in range(12):
        watched.world.engine.received(link, [(wire.BUSY, 0, 0, 0, 0, 0, None)])
        watched.look(LOOK_SECONDS)
    assert watched.states() == [IN_SYNC, OUT]


def test_when_all_are_late_nobody_is_out() -> None:
    watched = Watched()
    for pipe in watched.world.pipes.values():
        pipe.stalled = True
    write = watched.world.write(0, BLOCK)
    watched.look(WORK_SECONDS_MAX / 2)
    assert watched.states() == [IN_SYNC] * 3
    for pipe in watched.world.pipes.values():
        pipe.stalled = False
    watched.look(LOOK_SECONDS)
    assert write.error == 0


def test_the_last_member_in_sync_is_never_out_for_being_late() -> None:
    watched = Watched(1)
    watched.world.pipes["r0"].stalled = True
    write = watched.world.write(0, BLOCK)
    flush = watched.world.flush()
    watched.look(2 * WORK_SECONDS_MAX)
    assert watched.states() == [IN_SYNC]
    assert not write.answered
    watched.world.pipes["r0"].stalled = False
    watched.look(LOOK_SECONDS)
    assert (write.error, flush.error) == (0, 0)


def test_a_late_read_is_asked_of_another_member_and_the_late_one_is_out() -> None:
    watched = Watched(2)
    world = watched.world
    reader = world.engine.reader
    assert reader is not None
    world.pipes[reader.replica_uuid].stalled = True
    read = world.read(0, BLOCK_BYTES)
    watched.look(ANSWER_SECONDS_MAX + LOOK_SECONDS)
    watched.look(2 * LOOK_SECONDS)
    assert world.state(reader.replica_uuid) == OUT
    assert read.result == bytes(BLOCK_BYTES)


def test_a_read_that_is_late_everywhere_costs_nobody() -> None:
    watched = Watched(2)
    for replica in watched.world.replicas.values():
        replica.defers = True
    read = watched.world.read(0, BLOCK_BYTES)
    for _ in range(40):
        watched.world.clock.advance(LOOK_SECONDS)
        watched.watch.look(watched.world.clock.now())
        watched.world._send_everything()
        for pipe in watched.world.pipes.values():
            watched.world._arrive(pipe, 1 << 30)
    reader = watched.world.engine.reader
    assert reader is not None
    asked_first = watched.world.pipes[reader.replica_uuid]
    asked_first.stalled = True
    watched.world.settle()  # the other one answers, just as late
    assert watched.states() == [IN_SYNC] * 2
    asked_first.stalled = False
    watched.world.settle()
    assert read.answered


def test_a_flush_may_take_seconds_but_not_forever() -> None:
    watched = Watched(2)
    watched.world.replicas["r0"].defers = True
    flush = watched.world.flush()
    pipe = watched.world.pipes["r0"]
    pipe.muted = True
    watched.look(WORK_SECONDS_MAX - 1)
    assert watched.states() == [IN_SYNC] * 2
    watched.look(2)
    assert watched.states() == [OUT, IN_SYNC]
    assert flush.error == 0


def test_a_full_member_owes_no_write_but_signs_of_life() -> None:
    watched = Watched(2)
    world = watched.world
    world.replicas["r0"].fault = lambda operation, offset, length: errno.ENOSPC
    write = world.write(0, BLOCK)
    watched.look(2 * WORK_SECONDS_MAX)
    assert watched.states() == [IN_SYNC] * 2
    world.pipes["r0"].stalled = True
    watched.look(ANSWER_SECONDS_MAX + 3 * LOOK_SECONDS)
    assert watched.states() == [OUT, IN_SYNC]
    assert write.error == 0


@pytest.mark.parametrize(("factor", "out"), [(PEERS_FACTOR * 2, True), (1.5, False)])
def test_a_member_much_slower_than_its_peers_is_out_however_many_answers_it_gives(
    factor: float, out: bool
) -> None:
    """Every write is answered within the limit, so silence never shows it."""
    watched = Watched()
    world = watched.world
    slow, period = world.pipes["r2"], 8
    assert period * LOOK_SECONDS <= ANSWER_SECONDS_MAX
    others = [world.pipes["r0"], world.pipes["r1"]]
    for number in range(40 * period):
        if number % period == 0:
            world.write(0, BLOCK)
        slow.stalled = number % period != period - 1 and world.state("r2") == IN_SYNC
        for pipe in others:
            pipe.stalled = number % period < (period - 1) / factor - 1
        watched.look(LOOK_SECONDS)
    assert (world.state("r2") == OUT) is out
    assert watched.states()[:2] == [IN_SYNC] * 2
    assert (period / 2) * LOOK_SECONDS > SLOW_SECONDS


def test_nothing_is_looked_at_while_nobody_owes_anything() -> None:
    watched = Watched(2)
    assert watched.watch.idle
    watched.world.write(0, BLOCK)
    assert not watched.watch.idle
    watched.world.settle()
    assert watched.watch.idle
