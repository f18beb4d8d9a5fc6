"""Several snapshots at once, and the tree of them, on the command line.

Proves against a fake API which snapshots a range or `--keep-last` removes, in which order, that a
wrong one removes none, and that the tree shows branches and where the volume is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blockd.cli import output as out
from tests.blockd.cli_fake_node import FakeNode, Run, serving_unix, volume_view

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FakeNode]:
    with serving_unix(tmp_path / "blockd.sock") as fake:
        views = [{"name": name, "id": number} for number, name in enumerate(NAMES, start=1)]
        fake.answer("GET", "/v1/volumes/data/snapshots", views)
        for name in NAMES:
            fake.answer("DELETE", f"/v1/volumes/data/snapshots/{name}", {})
        yield fake


def removed(node: FakeNode) -> list[str]:
    return [asked.path.rpartition("/")[2] for asked in node.asked if asked.method == "DELETE"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("data@b..c",), ["b", "c"]),
        (("data@a..d",), NAMES),
        (("data@c..c",), ["c"]),
        (("data", "--keep-last", "3"), ["a"]),
        (("data", "--keep-last", "0"), NAMES),
        (("data", "--keep-last", "4"), []),
        (("data", "--keep-last", "200"), []),
    ],
)
def test_a_range_is_removed_oldest_first(
    node: FakeNode, run: Run, words: tuple[str, ...], names: list[str]
) -> None:
    code, printed, _ = run("snapshot", "rm", *words, "-o", "json")
    assert code == 0
    assert removed(node) == names
    answer = json.loads(printed)
    found = answer if isinstance(answer, list) else [answer]
    assert [one["name"] for one in found] == [f"data@{name}" for name in names]


def test_dots_can_be_part_of_a_name(node: FakeNode, run: Run) -> None:
    views = [{"name": name, "id": number} for number, name in enumerate(["a", "a..b", "b"])]
    node.answer("GET", "/v1/volumes/data/snapshots", views)
    node.answer("DELETE", "/v1/volumes/data/snapshots/a..b", {})
    assert run("snapshot", "rm", "data@a..b")[0] == 0
    assert removed(node) == ["a..b"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("data@a..x",), 3),
        (("data@x..b",), 3),
        (("data@c..b",), 2),
        (("data@a..",), 2),
        (("data@..b",), 2),
        (("data@",), 2),
        (("data",), 2),
        (("data@a", "--keep-last", "1"), 2),
        (("data", "--keep-last", "-1"), 2),
        (("data", "--keep-last", "255"), 2),
    ],
)
def test_a_wrong_range_removes_nothing(
    node: FakeNode, run: Run, words: tuple[str, ...], code: int
) -> None:
    assert run("snapshot", "rm", *words)[0] == code
    assert removed(node) == []


def test_the_tree_branches_where_several_were_taken_on_one(node: FakeNode, run: Run) -> None:
    parents = {"a": (1, 0), "b": (2, 1), "c": (3, 2), "d": (5, 2), "e": (6, 5)}
    snapshots = [
        {"name": name, "id": number, "parent": parent, "created": "2026-01-05T10:00:00Z"}
        for name, (number, parent) in parents.items()
    ]
    node.answer("GET", "/v1/volumes/data", volume_view(snapshots=snapshots, head_parent=2))
    code, printed, _ = run("snapshot", "tree", "data")
    assert code == 0
    assert printed.replace("  2026-01-05T10:00:00Z", "").splitlines() == [
        "a",
        "b",
        "├─ c",
        "├─ d",
        "│  e",
        "└─ (the volume now)",
    ]


def test_sizes_are_asked_for_only_with_the_option(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data/snapshots", volume_view()["snapshots"])
    used = {"monday": {"data_bytes": 3 << 30, "exclusive_bytes": 5 << 20}}
    node.answer("GET", "/v1/volumes/data/usage", {"data_bytes": 0, "snapshots": used})
    code, printed, _ = run("snapshot", "ls", "data")
    assert code == 0
    assert "FREES" not in printed
    assert len(node.asked) == 1
    code, printed, _ = run("snapshot", "ls", "data", "--sizes")
    assert code == 0
    assert "3 GiB  5 MiB" in printed
    code, printed, _ = run("snapshot", "ls", "data", "--sizes", "-o", "json")
    assert json.loads(printed)[0]["exclusive_bytes"] == 5 << 20


def test_an_age_has_one_unit() -> None:
    now = datetime(2026, 1, 11, 12, tzinfo=UTC)
    for created, age in (
        ("2026-01-11T11:59:20Z", "40s"),
        ("2026-01-11T11:57:00Z", "3m"),
        ("2026-01-11T07:00:00Z", "5h"),
        ("2026-01-01T12:00:00Z", "10d"),
        ("2026-01-11T12:00:09Z", "0s"),
        (None, "-"),
    ):
        assert out.age_text(created, now) == age
