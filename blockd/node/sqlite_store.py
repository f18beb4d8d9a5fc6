"""The store on one machine: one SQLite file, one process.

Rows are the JSON of the objects; the version counter is a row of its own, so it never goes back.
Watches are fed inside the process, after the commit: `blockd serve` is the only writer of this
table (its lock file sees to that). The same file holds the table of the authority, which volume
daemons write too; therefore every transaction here is short.

Durability: WAL with synchronous=FULL, so a write that returned survives a power cut.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from blockd.node.objects import Object, new_uid, utc_now
from blockd.node.store import Event
from protocol.errors import ConflictError, NotFoundError, StorageError

T = TypeVar("T", bound=Object)
Events = list[Event]

BUSY_SECONDS = 10.0  # the longest a volume daemon's commit can hold the file, with room
FORMAT_VERSION = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS objects (
    kind TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (kind, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS objects_counter (
    only INTEGER PRIMARY KEY CHECK (only = 1), format INTEGER NOT NULL, version INTEGER NOT NULL);
"""


class SqliteWatch:
    """Pending changes of one kind, at most one per object: the newest."""

    def __init__(self, store: SqliteStore, kind: str) -> None:
        self._store = store
        self.kind = kind
        self._pending: OrderedDict[str, Event] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, event: Event) -> None:
        """Called by the store after a commit."""
        with self._changed:
            self._pending[event.object.metadata.name] = event
            self._changed.notify_all()

    def next(self, timeout_seconds: float) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed, timeout_seconds)
            if not self._pending or self._closed:
                return None
            return self._pending.popitem(last=False)[1]

    def close(self) -> None:
        self._store.forget(self)
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class SqliteStore:
    """The Store interface on an SQLite file; safe to call from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._watches: list[SqliteWatch] = []
        try:
            self._db = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)
            self._db.execute(
                "INSERT OR IGNORE INTO objects_counter VALUES (1, ?, 0)", (FORMAT_VERSION,)
            )
            (found,) = self._db.execute("SELECT format FROM objects_counter").fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        if found != FORMAT_VERSION:
            raise StorageError(
                f"{path} has format {found}, this version knows {FORMAT_VERSION}; "
                "use the version of blockd that wrote it"
            )

    def close(self) -> None:
        """End all watches and close the file."""
        for watch in list(self._watches):
            watch.close()
        with self._lock:
            self._db.close()

    def get(self, kind: type[T], name: str) -> T:
        with self._lock, self._errors():
            row = self._db.execute(
                "SELECT content FROM objects WHERE kind = ? AND name = ?", (kind.kind, name)
            ).fetchone()
        if row is None:
            raise NotFoundError(f"{_word(kind.kind)} {name} does not exist")
        return self._decode(kind, name, row[0])

    def list(self, kind: type[T]) -> list[T]:
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT name, content FROM objects WHERE kind = ? ORDER BY name", (kind.kind,)
            ).fetchall()
        return [self._decode(kind, name, content) for name, content in rows]

    def watch(self, kind: type[T]) -> SqliteWatch:
        watch = SqliteWatch(self, kind.kind)
        with self._lock:
            for item in self.list(kind):
                watch.put(Event(item, gone=False))
            self._watches.append(watch)
        return watch

    def forget(self, watch: SqliteWatch) -> None:
        """A watch was closed."""
        with self._lock:
            if watch in self._watches:
                self._watches.remove(watch)

    def create(self, item: T) -> T:
        kind = type(item)
        with self._transaction() as events:
            if self._find(kind, item.metadata.name) is not None:
                raise ConflictError(f"{_word(kind.kind)} {item.metadata.name} exists already")
            made = self._decode(kind, item.metadata.name, msgspec.json.encode(item))
            metadata = made.metadata
            metadata.uid = metadata.uid or new_uid()
            metadata.created = utc_now()
            metadata.deleted = None
            metadata.generation = 1
            self._write(made)
            events.append(Event(made, gone=False))
        return self._decode(kind, made.metadata.name, msgspec.json.encode(made))

    def update(self, item: T) -> T:
        kind = type(item)
        with self._transaction() as events:
            stored = self._newest(kind, item)
            changed = item.spec != stored.spec
            stored.spec = item.spec
            stored.metadata.labels = item.metadata.labels
            stored.metadata.finalizers = item.metadata.finalizers
            stored.metadata.generation += int(changed)
            gone = stored.metadata.deleted is not None and not stored.metadata.finalizers
            self._remove(stored) if gone else self._write(stored)
            stored = self._decode(kind, item.metadata.name, msgspec.json.encode(stored))
            events.append(Event(stored, gone=gone))
        return self._decode(kind, item.metadata.name, msgspec.json.encode(stored))

    def update_status(self, item: T) -> T:
        kind = type(item)
        with self._transaction() as events:
            stored = self._newest(kind, item)
            stored.status = item.status
            self._write(stored)
            stored = self._decode(kind, item.metadata.name, msgspec.json.encode(stored))
            events.append(Event(stored, gone=False))
        return self._decode(kind, item.metadata.name, msgspec.json.encode(stored))

    def delete(self, kind: type[T], name: str) -> None:
        with self._transaction() as events:
            stored = self._find(kind, name)
            if stored is None:
                raise NotFoundError(f"{_word(kind.kind)} {name} does not exist")
            if stored.metadata.deleted is not None:
                return
            gone = not stored.metadata.finalizers
            stored.metadata.deleted = utc_now()
            self._remove(stored) if gone else self._write(stored)
            events.append(Event(stored, gone=gone))

    def _find(self, kind: type[T], name: str) -> T | None:
        try:
            return self.get(kind, name)
        except NotFoundError:
            return None

    def _newest(self, kind: type[T], item: T) -> T:
        stored = self.get(kind, item.metadata.name)
        if (
            stored.metadata.resource_version != item.metadata.resource_version
            or stored.metadata.uid != item.metadata.uid
        ):
            raise ConflictError(
                f"{_word(kind.kind)} {item.metadata.name} was changed by someone else "
                f"(version {stored.metadata.resource_version}, "
                f"seen {item.metadata.resource_version}); read it again"
            )
        return stored

    def _write(self, item: Object) -> None:
        metadata = item.metadata
        self._db.execute("UPDATE objects_counter SET version = version + 1")
        (metadata.resource_version,) = self._db.execute(
            "SELECT version FROM objects_counter"
        ).fetchone()
        self._db.execute(
            "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)",
            (item.kind, metadata.name, metadata.resource_version, msgspec.json.encode(item)),
        )

    def _remove(self, item: Object) -> None:
        self._db.execute("UPDATE objects_counter SET version = version + 1")
        self._db.execute(
            "DELETE FROM objects WHERE kind = ? AND name = ?", (item.kind, item.metadata.name)
        )

    def _decode(self, kind: type[T], name: str, content: bytes) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError as error:
            raise StorageError(
                f"the row of {_word(kind.kind)} {name} in {self._path} cannot be read ({error}); "
                "was it written by a newer version?"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[Events]:
        """One commit; the events put into the list are told in the order of the commits."""
        events: Events = []
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield events
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            for event in events:
                for watch in self._watches:
                    if watch.kind == event.object.kind:
                        watch.put(event)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> StorageError:
        return StorageError(
            f"the state in {self._path} cannot be used: {error}; "
            "check the file and the space on its disk"
        )


def _word(kind: str) -> str:
    return kind.lower()
