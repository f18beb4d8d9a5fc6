"""Where epoch, member states and the layer tree of a volume are kept, and how they change.

One record per volume, changed only by compare-and-swap on its `version`: whoever changes it has
seen the newest one. On one machine it is a row of an SQLite file; the interface is that of a
Kubernetes object with a resourceVersion, so a cluster can keep it there.

The volume daemon changes the record while it runs (epoch at open, a member's state before a
write is acknowledged without it, snapshots); the node service creates and deletes it and may
edit OUT members while no volume daemon runs.

If the process dies inside `swap`, SQLite's journal has either the old or the new row
(synchronous=FULL: the commit returns after fsync). A caller that does not learn the outcome
loads the record again and compares the version.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

from protocol.errors import ConflictError, NotFoundError, StorageError

IN_SYNC, SYNCING, OUT = "IN_SYNC", "SYNCING", "OUT"
RESERVE_BYTES = 1 << 20  # a dozen changes of a record with 254 snapshots
BUSY_TIMEOUT_SECONDS = 10.0  # longest wait for another process's commit; commits take milliseconds

T = TypeVar("T")

Version = int | str


@dataclass(frozen=True)
class Member:
    """One replica as the authority knows it.

    `out_at`: the configuration in which it ceased to be in sync; 0: it never was. What changed in
    that configuration or later, and what was not stable then, it may not have. `in_epoch`: the last
    epoch in which it was in sync while requests were answered.
    """

    state: str
    address: str
    out_at: int = 0
    in_epoch: int = 0


@dataclass(frozen=True)
class LayerRecord:
    """One sealed layer; `name` is empty for a layer that is no snapshot (any more)."""

    id: int
    parent: int
    name: str = ""
    created: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    removed: bool = False


@dataclass(frozen=True)
class Record:
    """All the authority keeps of one volume.

    `clean`: the last volume daemon closed everything; the members are equal. `served_epoch` is the
    last epoch in which requests were answered, 0 before the first; who was in sync then, has
    promised it. `pending` names a revert that was decided and may not have reached every member,
    `reverted` the newest one by the id its user gave it, "" if that has none. `stamp` names the
    change that made this record, so that its author knows it again if the answer of the swap was
    lost.
    `version` is what the authority gave with the record (SQLite: a number, Kubernetes: the
    resourceVersion); it means nothing but that another one is another record.
    """

    volume_uuid: str
    volume_name: str
    size_bytes: int
    members: Mapping[str, Member]
    epoch: int = 0
    served_epoch: int = 0
    config_seq: int = 0
    min_in_sync: int = 1  # with fewer members in sync nothing is acknowledged
    layers: tuple[LayerRecord, ...] = ()
    head_id: int = 1
    head_parent: int = 0
    next_layer_id: int = 2
    clean: bool = True
    pending: Mapping[str, int] | None = None
    reverted: str = ""
    stamp: str = ""
    version: Version = 0

    def with_state(self, replica_uuid: str, state: str) -> Record:
        """The record with one member in another state, as a new configuration."""
        member = self.members.get(replica_uuid)
        if member is None:
            raise NotFoundError(
                f"replica {replica_uuid} is no member of volume {self.volume_name} any more"
            )
        config_seq = self.config_seq + 1
        changed = replace(member, state=state)
        if member.state == IN_SYNC:
            changed = replace(changed, out_at=config_seq, in_epoch=self.served_epoch)
        members = {**self.members, replica_uuid: changed}
        return replace(self, members=members, config_seq=config_seq)

    def as_stranger(self, replica_uuid: str) -> Record:
        """The record with one member OUT of which nothing is known to be equal."""
        record = self.with_state(replica_uuid, OUT)
        member = replace(record.members[replica_uuid], out_at=0)
        return replace(record, members={**record.members, replica_uuid: member})

    def layer_named(self, name: str) -> LayerRecord | None:
        """The snapshot of that name; layers without a name are not found by it."""
        if not name:
            return None
        return next((layer for layer in self.layers if layer.name == name), None)


class Authority(Protocol):
    """The store of records. Every method may block and raises StorageError if it is away."""

    def load(self, volume_uuid: str) -> Record | None:
        """The newest record, None if there is none."""

    def find(self, volume_name: str) -> Record | None:
        """The newest record of the volume of that name."""

    def create(self, record: Record) -> Record:
        """Store the first record; ConflictError if one exists."""

    def swap(self, record: Record) -> Record:
        """Store `record` if nobody changed it since; the stored one, or ConflictError."""

    def delete(self, volume_uuid: str) -> None:
        """Forget the volume."""


def to_dict(record: Record) -> dict[str, Any]:
    """The JSON form of a record."""
    return asdict(record)


def from_dict(content: dict[str, Any], version: Version) -> Record:
    """A record from its JSON form."""
    content = {
        **content,
        "members": {uuid: Member(**member) for uuid, member in content["members"].items()},
        "layers": tuple(LayerRecord(**layer) for layer in content["layers"]),
        "version": version,
    }
    return Record(**content)


class SqliteAuthority:
    """Records as rows of one SQLite file, shared by all processes of a machine."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._reserve = f"{path}.reserve"
        self._call(_use_wal)
        self._call(
            lambda db: db.execute(
                "CREATE TABLE IF NOT EXISTS authority (volume_uuid TEXT PRIMARY KEY,"
                " volume_name TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, record TEXT NOT NULL)"
            )
        )

    def load(self, volume_uuid: str) -> Record | None:
        return self._one("volume_uuid", volume_uuid)

    def find(self, volume_name: str) -> Record | None:
        return self._one("volume_name", volume_name)

    def create(self, record: Record) -> Record:
        def insert(db: sqlite3.Connection) -> Record:
            try:
                db.execute(
                    "INSERT INTO authority VALUES (?, ?, 1, ?)",
                    (record.volume_uuid, record.volume_name, _encode(record)),
                )
            except sqlite3.IntegrityError:
                raise ConflictError(
                    f"a volume named {record.volume_name} or with id {record.volume_uuid} has a "
                    f"record in {self.path} already; choose another name or delete it first"
                ) from None
            return replace(record, version=1)

        return self._call(insert)

    def swap(self, record: Record) -> Record:
        def update(db: sqlite3.Connection) -> Record:
            cursor = db.execute(
                "UPDATE authority SET version = version + 1, volume_name = ?, record = ?"
                " WHERE volume_uuid = ? AND version = ?",
                (record.volume_name, _encode(record), record.volume_uuid, record.version),
            )
            if cursor.rowcount == 1:
                return replace(record, version=int(record.version) + 1)
            row = db.execute(
                "SELECT version FROM authority WHERE volume_uuid = ?", (record.volume_uuid,)
            ).fetchone()
            if row is None:
                raise NotFoundError(f"volume {record.volume_name} has no record in {self.path}")
            raise ConflictError(
                f"the record of volume {record.volume_name} moved to version {row[0]} while "
                f"version {record.version} was changed here; load it again"
            )

        return self._call(update)

    def delete(self, volume_uuid: str) -> None:
        self._call(
            lambda db: db.execute("DELETE FROM authority WHERE volume_uuid = ?", (volume_uuid,))
        )

    def _one(self, column: str, value: str) -> Record | None:
        def select(db: sqlite3.Connection) -> Record | None:
            row = db.execute(
                f"SELECT record, version FROM authority WHERE {column} = ?", (value,)
            ).fetchone()
            if row is None:
                return None
            try:
                return from_dict(json.loads(row[0]), row[1])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StorageError(
                    f"the record of volume {value} in {self.path} is damaged ({error!r}); "
                    "restore the file from a backup"
                ) from None

        return self._call(select)

    def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one transaction on a connection of its own (threads call this).

        A member that had no space must be recorded as OUT even though the disk is full: the space
        of a reserve file is given back for that, and taken again when there is some.
        """
        try:
            try:
                result = self._transaction(work)
            except sqlite3.OperationalError as error:
                # "disk I/O error" is what it says when the shared-memory file finds no space.
                no_space = "full" in str(error) or "disk I/O error" in str(error)
                if not no_space or not self._release_reserve():
                    raise
                result = self._transaction(work)
        except sqlite3.Error as error:
            raise StorageError(
                f"the volume records in {self.path} cannot be used: {error}; "
                "check the file, its directory and the free space"
            ) from None
        self._take_reserve()
        return result

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_SECONDS)) as db:
            db.execute("PRAGMA synchronous=FULL")
            with db:
                return work(db)

    def _take_reserve(self) -> None:
        with contextlib.suppress(OSError):  # none to be had now: the next change tries again
            if not os.path.exists(self._reserve):
                fd = os.open(self._reserve, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(fd, 0, RESERVE_BYTES)
                except OSError:
                    os.unlink(self._reserve)
                finally:
                    os.close(fd)

    def _release_reserve(self) -> bool:
        try:
            os.unlink(self._reserve)
        except OSError:
            return False
        return True


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch the file to WAL; SQLite's busy timeout does not cover this one statement."""
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _encode(record: Record) -> str:
    content = to_dict(record)
    del content["version"]
    return json.dumps(content)
