"""Proves the range lock against the plainest model of it: no two overlapping holders, waiters on
the same blocks run in the order they came, everybody runs in the end and exactly once (rule 8).
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from replication.ranges import RangeLocks

Range = tuple[int, int]


def overlap(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


class Model:
    """Everybody in arrival order; one may run when nobody before it overlaps it and still holds
    or waits. Plain operations never hold."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, Range, bool]] = []
        self.held: set[int] = set()
        self.ran: list[int] = []

    def add(self, number: int, blocks: Range, hold: bool) -> None:
        self.entries.append((number, blocks, hold))
        self._run()

    def release(self, number: int) -> None:
        self.held.remove(number)
        self.entries = [entry for entry in self.entries if entry[0] != number]
        self._run()

    def _run(self) -> None:
        kept: list[tuple[int, Range, bool]] = []
        for number, blocks, hold in self.entries:
            if number in self.held or any(overlap(blocks, other) for _, other, _ in kept):
                kept.append((number, blocks, hold))
            else:
                self.ran.append(number)
                if hold:
                    self.held.add(number)
                    kept.append((number, blocks, hold))
        self.entries = kept


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, 9), st.integers(1, 6)),
        st.tuples(st.just("plain"), st.integers(0, 9), st.integers(1, 6)),
        st.tuples(st.just("release"), st.integers(0, 99), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(ACTIONS)
def test_the_lock_agrees_with_the_model(actions: list[tuple[str, int, int]]) -> None:
    locks, model = RangeLocks(), Model()
    ran: list[int] = []
    blocks_of: dict[int, Range] = {}
    holding: list[int] = []

    def run_holder(number: int) -> None:
        assert not any(overlap(blocks_of[number], blocks_of[other]) for other in holding)
        holding.append(number)
        ran.append(number)

    def run_plain(number: int) -> None:
        assert not any(overlap(blocks_of[number], blocks_of[other]) for other in holding)
        ran.append(number)

    for number, (what, first, count) in enumerate(actions):
        blocks = (first, first + count)
        if what == "release":
            if not holding:
                continue
            freed = holding.pop(first % len(holding))
            model.release(freed)
            locks.release(*blocks_of[freed])
        else:
            blocks_of[number] = blocks
            model.add(number, blocks, what == "hold")
            if what == "hold":
                locks.acquire(*blocks, lambda number=number: run_holder(number))  # type: ignore[misc]
            elif locks.held and locks.blocks(*blocks):
                locks.wait(*blocks, lambda number=number: run_plain(number))  # type: ignore[misc]
            else:
                run_plain(number)
        assert set(holding) == model.held
        assert sorted(ran) == sorted(model.ran)
        for index, one in enumerate(ran):  # overlapping ones in order of arrival
            for other in ran[:index]:
                assert other < one or not overlap(blocks_of[one], blocks_of[other])
    while holding:
        freed = holding.pop()
        model.release(freed)
        locks.release(*blocks_of[freed])
    assert sorted(ran) == sorted(blocks_of)
    assert not locks.held
    assert not locks.waiting


def test_a_holder_that_releases_at_once_does_not_let_later_ones_pass_earlier_ones() -> None:
    locks = RangeLocks()
    ran: list[str] = []

    def run_and_release(name: str, first: int, stop: int) -> None:
        ran.append(name)
        locks.release(first, stop)

    locks.acquire(0, 10, lambda: None)
    locks.acquire(0, 3, lambda: run_and_release("first", 0, 3))
    locks.wait(5, 6, lambda: ran.append("second"))
    locks.wait(2, 6, lambda: ran.append("third"))
    locks.release(0, 10)
    assert ran == ["first", "second", "third"]
    assert not locks.held
