"""Proves that changes of the structure run one after the other, each once, as they came."""

from __future__ import annotations

from protocol.errors import BlockdError, StateError
from replication.turns import Done, Turns


def test_turns_are_taken_one_after_the_other_in_order() -> None:
    turns = Turns()
    ends: list[Done] = []
    done: list[BlockdError | None] = []
    for _ in range(3):
        turns.take(ends.append, done.append)
    for count in range(1, 4):
        assert len(ends) == count
        assert turns.busy
        ends[-1](None)
    assert done == [None] * 3
    assert not turns.busy


def test_work_that_raises_ends_its_turn_with_the_error() -> None:
    turns = Turns()
    done: list[BlockdError | None] = []

    def refuse(end: Done) -> None:
        raise StateError("not now")

    turns.take(refuse, done.append)
    turns.take(lambda end: end(None), done.append)
    assert isinstance(done[0], StateError)
    assert done[1] is None
    assert not turns.busy


def test_a_turn_asked_for_by_an_answer_comes_after_those_that_wait() -> None:
    turns = Turns()
    order: list[str] = []
    ends: list[Done] = []

    def work(name: str) -> None:
        def start(end: Done) -> None:
            order.append(name)
            ends.append(end)

        turns.take(start, lambda error: work("third") if name == "first" else None)

    work("first")
    work("second")
    while ends:
        ends.pop()(None)
    assert order == ["first", "second", "third"]
    assert not turns.busy
