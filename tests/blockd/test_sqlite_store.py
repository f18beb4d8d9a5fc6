"""Proves that the SQLite store keeps the store's rules, over a reopening and in one shared file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.node.objects import Volume
from blockd.node.sqlite_store import SqliteStore
from protocol.errors import StorageError
from tests.blockd.store_conformance import StoreConformance, volume


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "state.db")
    yield opened
    opened.close()


class TestSqliteStore(StoreConformance):
    """The conformance suite on SQLite."""


def test_objects_and_the_version_counter_survive_reopening(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    store.create(volume("a"))
    made = store.create(volume("b"))
    store.delete(Volume, "a")
    store.close()
    store = SqliteStore(tmp_path / "state.db")
    assert store.list(Volume) == [made]
    assert store.create(volume("a")).metadata.resource_version > made.metadata.resource_version + 1
    store.close()


def test_a_commit_is_synchronous(store: SqliteStore) -> None:
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"state\.db cannot be used"):
        SqliteStore(path)


def test_a_row_that_cannot_be_read_is_a_clear_error(store: SqliteStore, tmp_path: Path) -> None:
    store.create(volume())
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE objects SET content = '{\"metadata\": 1}'")
    with pytest.raises(StorageError, match="row of volume data"):
        store.get(Volume, "data")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "state.db").close()
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("UPDATE objects_counter SET format = 99")
    with pytest.raises(StorageError, match="format 99"):
        SqliteStore(tmp_path / "state.db")
