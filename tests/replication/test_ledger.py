"""Proves that changes of the record happen one after the other, on the newest record, wait while
the authority is away, and stop for good when somebody else owns the volume.
"""

from __future__ import annotations

from dataclasses import replace

from protocol.errors import BlockdError, StateError
from replication.authority import Record
from replication.ledger import RETRY_SECONDS
from tests.replication.world import VOLUME, World


def grow(record: Record) -> Record:
    return replace(record, config_seq=record.config_seq + 1)


def refuse(record: Record) -> Record:
    raise StateError("not now")


def test_changes_are_applied_in_order_each_on_the_newest_record() -> None:
    world = World(1)
    seen: list[int] = []

    def change(record: Record) -> Record:
        seen.append(record.config_seq)
        return grow(record)

    for _ in range(4):
        world.ledger.change(change, lambda error: None)
    world.settle()
    assert seen == [0, 1, 2, 3]
    assert world.ledger.record == world.authority.records[VOLUME]


def test_a_change_that_refuses_is_answered_and_the_next_one_goes_on() -> None:
    world = World(1)
    outcome: list[BlockdError | None] = []
    world.ledger.change(refuse, outcome.append)
    world.ledger.change(grow, outcome.append)
    world.settle()
    assert isinstance(outcome[0], StateError)
    assert outcome[1] is None
    assert world.authority.records[VOLUME].config_seq == 1


def test_a_change_asked_for_by_an_answer_is_applied() -> None:
    world = World(1)
    outcome: list[BlockdError | None] = []
    world.ledger.change(grow, lambda error: world.ledger.change(grow, outcome.append))
    world.ledger.change(refuse, lambda error: world.ledger.change(grow, outcome.append))
    world.settle()
    assert outcome == [None, None]
    assert world.authority.records[VOLUME].config_seq == 3


def test_changes_wait_in_order_while_the_authority_is_away() -> None:
    world = World(1)
    world.authority.away = True
    order: list[int] = []
    for number in range(3):
        world.ledger.change(grow, lambda error, number=number: order.append(number))  # type: ignore[misc]
    for _ in range(5):
        world.settle()
        world.clock.advance(RETRY_SECONDS)
    assert order == []
    assert world.ledger.held is not None
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert order == [0, 1, 2]
    assert world.authority.records[VOLUME].config_seq == 3


def test_a_lost_race_is_run_again_on_what_the_winner_wrote() -> None:
    world = World(1)
    races = 3

    def change(record: Record) -> Record:
        nonlocal races
        if races:
            races -= 1
            world.authority.edit(VOLUME, lambda theirs: replace(theirs, next_layer_id=99))
        return grow(record)

    outcome: list[BlockdError | None] = []
    world.ledger.change(change, outcome.append)
    world.settle()
    record = world.authority.records[VOLUME]
    assert outcome == [None]
    assert (record.config_seq, record.next_layer_id) == (1, 99)


def test_nothing_is_done_after_another_owner_was_seen() -> None:
    world = World(1)
    world.authority.edit(VOLUME, lambda record: replace(record, epoch=9))
    outcome: list[BlockdError | None] = []
    world.ledger.change(grow, outcome.append)
    world.settle()
    world.ledger.change(grow, outcome.append)
    world.settle()
    world.clock.advance(5)
    assert outcome == []
    assert len(world.fenced) == 1
    assert world.authority.records[VOLUME].config_seq == 0


def test_the_authority_away_during_a_lost_race_is_only_a_delay() -> None:
    world = World(1)
    outcome: list[BlockdError | None] = []
    load = world.authority.load
    world.authority.edit(VOLUME, grow)

    def away_once(volume_uuid: str) -> Record | None:
        world.authority.load = load  # type: ignore[method-assign]
        world.authority.away = True
        return load(volume_uuid)

    world.authority.load = away_once  # type: ignore[method-assign]
    world.ledger.change(grow, outcome.append)
    world.settle()
    assert outcome == []
    world.authority.away = False
    world.clock.advance(RETRY_SECONDS)
    world.settle()
    assert outcome == [None]
    assert world.authority.records[VOLUME].config_seq == 2
