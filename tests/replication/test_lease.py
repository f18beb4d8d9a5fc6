"""Proves when reads are answered: only while every member that may be IN_SYNC has confirmed this
session within the lease (rule 4), so never by an owner that was replaced."""

from __future__ import annotations

from protocol import replica as wire
from protocol.units import BLOCK_BYTES
from replication.authority import IN_SYNC
from replication.lease import LEASE_SECONDS, RENEW_SECONDS, TAKEOVER_SECONDS
from replication.ledger import RETRY_SECONDS
from tests.replication.world import World

BLOCK = b"\xa5" * BLOCK_BYTES


def pings(world: World) -> int:
    """Pings under way."""
    return sum(
        answer == wire.PONG
        for link in world.engine.links.values()
        for answer, _ in link.calls.values()
    )


def test_a_new_owner_waits_longer_than_an_old_one_reads() -> None:
    assert TAKEOVER_SECONDS > LEASE_SECONDS


def test_reads_wait_until_every_member_has_confirmed() -> None:
    world = World(3)
    world.pipes["r1"].stalled = True
    read = world.read(0, BLOCK_BYTES)
    world.settle()
    assert not read.answered
    world.pipes["r1"].stalled = False
    world.settle()
    assert read.result == bytes(BLOCK_BYTES)


def test_a_busy_volume_renews_before_the_lease_ends_and_reads_never_wait() -> None:
    world = World(2)
    world.read(0, BLOCK_BYTES)
    world.settle()
    for _ in range(20):
        world.clock.advance(RENEW_SECONDS)
        read = world.read(0, BLOCK_BYTES)
        assert any(link.reads for link in world.engine.links.values()), "it is on its way"
        assert pings(world) == 2
        world.settle()
        assert read.answered


def test_an_idle_volume_sends_no_pings_and_the_first_read_after_it_asks() -> None:
    world = World(2)
    world.read(0, BLOCK_BYTES)
    world.settle()
    world.clock.advance(100)
    assert pings(world) == 0
    read = world.read(0, BLOCK_BYTES)
    assert pings(world) == 2
    world.settle()
    assert read.answered


def test_the_age_of_a_confirmation_counts_from_its_question() -> None:
    world = World(2)
    world.read(0, BLOCK_BYTES)
    world._send_everything()
    world.clock.advance(LEASE_SECONDS - 1)  # the answers take that long
    world.settle_until(lambda: any(link.reads for link in world.engine.links.values()))
    assert world.engine.lease.until == LEASE_SECONDS


def test_a_confirmation_that_comes_too_late_is_asked_for_again() -> None:
    world = World(2)
    read = world.read(0, BLOCK_BYTES)
    world._send_everything()
    world.clock.advance(LEASE_SECONDS)
    world.settle()
    assert read.answered


def test_an_owner_cut_off_from_one_member_stops_reading_from_the_other() -> None:
    """The other side may have a new owner, which this member never heard of."""
    world = World(2)
    world.read(0, BLOCK_BYTES)
    world.settle()
    world.pipes["r1"].stalled = True
    world.authority.away = True
    world.engine.reader = world.link("r0")
    early = world.read(0, BLOCK_BYTES)
    world.settle()
    assert early.answered
    world.clock.advance(LEASE_SECONDS)
    late = world.read(0, BLOCK_BYTES)
    world.read(0, BLOCK_BYTES)
    assert not any(link.reads for link in world.engine.links.values()), "both wait"
    world.settle()
    assert not late.answered
    world.lose("r1")
    world.settle()
    assert not late.answered, "the record may still call it IN_SYNC"
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert late.answered


def test_a_single_member_needs_no_lease() -> None:
    world = World(1)
    read = world.read(0, BLOCK_BYTES)
    assert pings(world) == 0
    world.settle()
    assert read.answered
    world.clock.advance(100)
    world.read(0, BLOCK_BYTES)
    assert pings(world) == 0


def test_a_member_about_to_be_in_sync_must_confirm_too() -> None:
    world = World(2)
    world.lose("r1")
    world.settle()
    world.reconnect("r1")
    world.rebuild("r1")
    world.settle_until(lambda: world.link("r1").promoting)
    world.pipes["r1"].stalled = True
    world.clock.advance(LEASE_SECONDS)
    read = world.read(0, BLOCK_BYTES)
    world.settle()
    assert world.state("r1") == IN_SYNC
    assert not read.answered


def test_reads_that_wait_fail_when_the_last_member_is_lost() -> None:
    world = World(2)
    for pipe in world.pipes.values():
        pipe.stalled = True
    read = world.read(0, BLOCK_BYTES)
    world.lose("r0")
    world.lose("r1")
    world.settle()
    assert read.error
