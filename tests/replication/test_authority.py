"""Proves the record store: every field survives, a version has exactly one winner among threads and
processes, and whatever is wrong with the file is a StorageError.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from protocol.errors import BlockdError, ConflictError, NotFoundError, StorageError
from replication.authority import (
    IN_SYNC,
    OUT,
    LayerRecord,
    Member,
    Record,
    SqliteAuthority,
    from_dict,
    to_dict,
)

RECORD = Record(
    volume_uuid="aaaa",
    volume_name="data",
    size_bytes=1 << 40,
    members={"r0": Member(IN_SYNC, "tcp:[::1]:9"), "r1": Member(OUT, "unix:/ü")},
    epoch=3,
    config_seq=4,
    layers=(
        LayerRecord(1, 0, "one", "2026-01-01T00:00:00Z", {"k": "ä\u2028"}),
        LayerRecord(2, 1, removed=True),
    ),
    head_id=3,
    head_parent=2,
    next_layer_id=4,
    clean=False,
    pending={"layer_id": 1, "new_head_id": 5},
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state.db")


def test_a_record_survives_with_every_field(path: str) -> None:
    created = SqliteAuthority(path).create(RECORD)
    assert created == replace(RECORD, version=1)
    again = SqliteAuthority(path)
    assert again.load("aaaa") == again.find("data") == created
    assert from_dict(json.loads(json.dumps(to_dict(created))), 1) == created


def test_what_is_not_there_is_none(path: str) -> None:
    authority = SqliteAuthority(path)
    assert authority.load("aaaa") is None
    assert authority.find("data") is None


def test_a_second_record_of_a_volume_is_refused(path: str) -> None:
    authority = SqliteAuthority(path)
    authority.create(RECORD)
    with pytest.raises(ConflictError):
        authority.create(replace(RECORD, volume_name="other"))
    assert authority.load("aaaa") == replace(RECORD, version=1)


def test_a_second_volume_of_a_name_is_refused(path: str) -> None:
    authority = SqliteAuthority(path)
    authority.create(RECORD)
    with pytest.raises(ConflictError):
        authority.create(replace(RECORD, volume_uuid="bbbb"))


def test_a_swap_returns_the_stored_record_and_moves_the_version(path: str) -> None:
    authority = SqliteAuthority(path)
    record = authority.create(RECORD)
    stored = authority.swap(replace(record, epoch=4, volume_name="renamed"))
    assert stored == replace(record, epoch=4, volume_name="renamed", version=2)
    assert authority.load("aaaa") == authority.find("renamed") == stored
    assert authority.find("data") is None


def test_a_swap_of_an_old_version_changes_nothing(path: str) -> None:
    authority = SqliteAuthority(path)
    record = authority.create(RECORD)
    newest = authority.swap(replace(record, epoch=4))
    for version in (0, 1, 3, -1):
        with pytest.raises(ConflictError):
            authority.swap(replace(record, epoch=5, version=version))
    assert authority.load("aaaa") == newest


def test_a_swap_of_a_deleted_record_says_so(path: str) -> None:
    authority = SqliteAuthority(path)
    record = authority.create(RECORD)
    authority.delete("aaaa")
    authority.delete("aaaa")
    with pytest.raises(NotFoundError):
        authority.swap(record)
    assert authority.load("aaaa") is None


def test_volumes_do_not_disturb_each_other(path: str) -> None:
    authority = SqliteAuthority(path)
    authority.create(RECORD)
    other = authority.create(replace(RECORD, volume_uuid="bbbb", volume_name="other"))
    authority.swap(replace(other, epoch=7))
    authority.delete("bbbb")
    assert authority.load("aaaa") == replace(RECORD, version=1)


ROUNDS = 5
RACERS = 4


def race(path: str, name: str, start: Callable[[], object], report: Callable[[int], None]) -> None:
    """Try to change every version once, with the others; report the versions won."""
    authority = SqliteAuthority(path)
    for version in range(1, ROUNDS + 1):
        start()
        record = replace(RECORD, version=version, volume_name=name)
        try:
            authority.swap(record)
        except ConflictError:
            continue
        report(version)


def test_each_version_has_one_winner_among_threads(path: str) -> None:
    SqliteAuthority(path).create(RECORD)
    barrier = threading.Barrier(RACERS)
    won: list[int] = []
    threads = [
        threading.Thread(target=race, args=(path, f"n{n}", partial(barrier.wait, 30), won.append))
        for n in range(RACERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == list(range(1, ROUNDS + 1))


def test_each_version_has_one_winner_among_processes(path: str) -> None:
    SqliteAuthority(path).create(RECORD)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(RACERS)
    won: multiprocessing.Queue[int] = context.Queue()
    racers = [
        context.Process(target=race, args=(path, f"n{n}", partial(barrier.wait, 30), won.put))
        for n in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    versions = sorted(won.get(timeout=60) for _ in range(ROUNDS))
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * RACERS
    assert versions == list(range(1, ROUNDS + 1))
    assert won.empty()
    newest = SqliteAuthority(path).load("aaaa")
    assert newest is not None
    assert newest.version == ROUNDS + 1


def test_only_one_of_several_creators_wins(path: str) -> None:
    authority = SqliteAuthority(path)
    barrier = threading.Barrier(RACERS)
    won: list[str] = []

    def create(name: str) -> None:
        barrier.wait(30)
        try:
            won.append(authority.create(replace(RECORD, volume_name=name)).volume_name)
        except ConflictError:
            return

    threads = [threading.Thread(target=create, args=(f"n{n}",)) for n in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    record = SqliteAuthority(path).load("aaaa")
    assert record is not None
    assert won == [record.volume_name]


def all_calls(authority: SqliteAuthority) -> list[Callable[[], object]]:
    return [
        lambda: authority.load("aaaa"),
        lambda: authority.find("data"),
        lambda: authority.swap(RECORD),
        lambda: authority.create(RECORD),
        lambda: authority.delete("aaaa"),
    ]


def test_every_call_on_an_unusable_file_is_a_storage_error(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    authority = SqliteAuthority(path)
    for leftover in tmp_path.iterdir():
        leftover.unlink()
    Path(path).write_bytes(b"this is no database" * 100)
    for call in all_calls(authority):
        with pytest.raises(StorageError) as caught:
            call()
        assert path in str(caught.value)


def test_a_file_in_a_missing_directory_or_a_directory_is_a_storage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "state.db", tmp_path):
        with pytest.raises(StorageError):
            SqliteAuthority(str(path))


def test_a_locked_file_is_a_storage_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = SqliteAuthority(path)
    record = authority.create(RECORD)
    monkeypatch.setattr("replication.authority.BUSY_TIMEOUT_SECONDS", 0.01)
    holder = sqlite3.connect(path)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StorageError):
            authority.swap(record)
        assert authority.load("aaaa") == record
    finally:
        holder.close()
    assert authority.swap(record).version == 2


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"members": 3, "layers": []}',
        json.dumps({**to_dict(RECORD), "a_later_version_added": 1}),
    ],
)
def test_a_damaged_row_is_a_storage_error(path: str, text: str) -> None:
    authority = SqliteAuthority(path)
    authority.create(RECORD)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE authority SET record = ?", (text,))
    db.close()
    with pytest.raises(BlockdError) as caught:
        authority.load("aaaa")
    assert isinstance(caught.value, StorageError)


def test_a_swap_that_was_answered_is_there_after_the_process_is_killed(path: str) -> None:
    SqliteAuthority(path).create(RECORD)
    child = os.fork()
    if not child:
        SqliteAuthority(path).swap(replace(RECORD, version=1, epoch=77))
        os._exit(9)
    os.waitpid(child, 0)
    record = SqliteAuthority(path).load("aaaa")
    assert record is not None
    assert record.epoch == 77


@pytest.mark.parametrize(("name", "found"), [("one", 1), ("two", None)], ids=["known", "unknown"])
def test_a_snapshot_is_found_by_its_name(name: str, found: int | None) -> None:
    layer = RECORD.layer_named(name)
    assert (layer.id if layer else None) == found


def test_another_state_is_another_configuration() -> None:
    changed = RECORD.with_state("r1", IN_SYNC)
    assert changed.members["r1"] == Member(IN_SYNC, "unix:/ü")
    assert changed.members["r0"] == RECORD.members["r0"]
    assert changed.config_seq == RECORD.config_seq + 1
    assert RECORD.members["r1"].state == OUT


def test_a_full_disk_still_takes_the_change_that_puts_a_member_out(tmp_path: Path) -> None:
    """On a real small file system; needs root for the mount."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=True)
    try:
        authority = SqliteAuthority(str(mount / "state.db"))
        record = authority.create(RECORD)
        with open(mount / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        out = next(iter(record.members))
        for state in ("OUT", "SYNCING", "OUT"):
            record = authority.swap(record.with_state(out, state))
        loaded = authority.load(record.volume_uuid)
        assert loaded is not None
        assert loaded.members[out].state == "OUT"
        (mount / "filler").unlink()
        authority.swap(record.with_state(out, "SYNCING"))
        assert (mount / "state.db.reserve").stat().st_blocks * 512 >= 1 << 20
    finally:
        subprocess.run(["umount", str(mount)], check=True)
