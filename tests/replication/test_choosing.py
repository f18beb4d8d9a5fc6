"""Proves which member is the truth after an unclean end, which others stay in sync, and what has to
be repeated for that (rules 6 and 7); never one that may have gone back in time for a living user.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from protocol.errors import DegradedError
from replication.authority import IN_SYNC, OUT, Member, Record
from replication.choosing import REPEATED_BLOCKS_MAX, choose

Change = tuple[int, int, int]


def record_of(**states: str) -> Record:
    members = {uuid: Member(state, "address") for uuid, state in states.items()}
    return Record("11111111-1111-1111-1111-111111111111", "vol", 1 << 30, members)


def hello(
    sequence: int = 0,
    changes: list[Change] | None = None,
    *,
    epoch: int = 4,
    base: int = 0,
    unbroken: bool = True,
    refused: str = "",
    head_id: int = 1,
    complete: bool = True,
) -> dict[str, Any]:
    return {
        "complete": complete,
        "unbroken": unbroken,
        "position": [epoch, sequence, refused],
        "head_id": head_id,
        "recent": {"base": base, "changes": [list(change) for change in changes or []]},
    }


FIVE: list[Change] = [(1, 10, 1), (2, 20, 2), (3, 30, 1), (4, 40, 1), (5, 50, 1)]
TWO = record_of(a=IN_SYNC, b=IN_SYNC)


def test_after_a_clean_end_all_in_sync_are_equal() -> None:
    record = record_of(a=IN_SYNC, b=IN_SYNC, c=OUT)
    choice = choose(record, {"a": hello(9), "b": hello(3), "c": hello(9)}, True, False)
    assert choice.in_sync == ("a", "b")
    assert choice.behind == {}


def test_the_one_that_applied_most_is_the_source_and_the_other_gets_the_difference() -> None:
    hellos = {"a": hello(3, FIVE[:3]), "b": hello(5, FIVE)}
    choice = choose(TWO, hellos, False, False)
    assert choice.source == "b"
    assert choice.equal == ("b",)
    assert choice.behind == {"a": [(40, 1), (50, 1)]}


def test_members_at_one_position_are_equal() -> None:
    hellos = {"a": hello(5, FIVE[3:], base=3), "b": hello(5, FIVE)}
    assert choose(TWO, hellos, False, False).in_sync == ("a", "b")


def test_what_overtook_on_a_full_member_is_repeated_too() -> None:
    """`a` waits with change 4, but has done 5 already."""
    hellos = {"a": hello(3, [*FIVE[:3], FIVE[4]]), "b": hello(3, FIVE[:3])}
    assert choose(TWO, hellos, False, False).behind == {"b": [(50, 1)]}


@pytest.mark.parametrize(
    ("a", "why"),
    [
        (hello(3, FIVE[:3], epoch=3), "another owner"),
        (hello(0, epoch=0), "its process is new"),
        (hello(3, FIVE[:3], refused="x"), "it refused a write"),
        (hello(3, FIVE[:3], head_id=2), "a snapshot on one of them"),
        (hello(1, FIVE[:1]), "the other one forgot what was between"),
        (hello(3, FIVE[:3], unbroken=False), "its machine was rebooted"),
        (hello(3, FIVE[:3], complete=False), "it was being rebuilt"),
    ],
)
def test_members_that_cannot_be_compared_do_not_stay_in_sync(a: dict[str, Any], why: str) -> None:
    hellos = {"a": a, "b": hello(5, FIVE[2:], base=2)}
    choice = choose(TWO, hellos, False, False)
    assert choice.in_sync == ("b",), why


def test_too_much_to_repeat_is_left_to_a_comparison() -> None:
    hellos = {"a": hello(0, epoch=4), "b": hello(1, [(1, 0, REPEATED_BLOCKS_MAX + 1)])}
    assert choose(TWO, hellos, False, False).in_sync == ("b",)


def test_a_member_that_lost_power_is_the_source_only_if_no_other_is_left() -> None:
    hellos = {"a": hello(9, unbroken=False), "b": hello(5)}
    assert choose(TWO, hellos, False, False).source == "b"
    assert choose(TWO, {"a": hellos["a"]}, False, False).source == "a"


def test_a_living_user_never_sees_the_volume_go_back_in_time() -> None:
    hellos = {"a": hello(9, unbroken=False)}
    with pytest.raises(DegradedError, match="rebooted"):
        choose(TWO, hellos, False, True)
    assert choose(TWO, {"a": hello(9)}, False, True).source == "a"


@pytest.mark.parametrize(
    "hellos", [{}, {"a": hello(complete=False)}, {"b": hello(5)}], ids=["none", "incomplete", "out"]
)
def test_without_a_complete_member_in_sync_the_volume_does_not_open(hellos: dict[str, Any]) -> None:
    with pytest.raises(DegradedError, match="no complete replica"):
        choose(record_of(a=IN_SYNC, b=OUT), hellos, False, False)


@pytest.mark.parametrize("seed", range(200))
def test_repeating_the_difference_makes_any_members_equal(seed: int) -> None:
    """Members apply prefixes of one order; what is repeated covers every block they differ in."""
    draw = random.Random(seed)
    changes = [(n, draw.randrange(30), draw.randrange(1, 4)) for n in range(1, 15)]
    everywhere = draw.randrange(0, 8)
    contents: dict[str, dict[int, int]] = {}
    hellos = {}
    for uuid in ("a", "b", "c"):
        applied = draw.randrange(everywhere, 15)
        forgotten = draw.randrange(0, everywhere + 1)
        content: dict[int, int] = {}
        for sequence, first, count in changes[:applied]:
            content.update(dict.fromkeys(range(first, first + count), sequence))
        contents[uuid] = content
        hellos[uuid] = hello(applied, changes[forgotten:applied], base=forgotten)
    choice = choose(record_of(a=IN_SYNC, b=IN_SYNC, c=IN_SYNC), hellos, False, False)
    source = contents[choice.source]
    for uuid in choice.equal:
        assert contents[uuid] == source
    for uuid, ranges in choice.behind.items():
        for first, count in ranges:
            for block in range(first, first + count):
                contents[uuid][block] = source.get(block, 0)
        assert {k: v for k, v in contents[uuid].items() if v} == source
    assert set(choice.in_sync) == {"a", "b", "c"}
