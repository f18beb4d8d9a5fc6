"""Opening a volume: a new epoch that everybody has promised, and who is in sync then.

Order, and what a death after each step leaves (replication rules 1, 4, 6, 7, 11):

1. Load or create the record.                 Nothing changed, or a record of equal blank replicas.
2. Introduce ourselves to every replica.      Nothing changed.
3. Swap epoch + 1, clean = false.             The next open takes a higher one.
4. FENCE every reachable member.              Older owners cannot write any more.
5. Wait for the read lease of an older owner, if a member could not be fenced.
6. Judge the members (choosing.py), finish what was half done.      Repeated by the next open.
7. Swap the members that do not stay in sync OUT, and tell the others that they are in sync: from
   then on they count as not rebooted.                              Now requests may be answered.

Members that are only a few changes behind stay in sync: those are repeated before anybody is served
(VolumeDaemon.catch_up). The others are made equal while the volume is in use.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from blockd.daemons.handshake import Session
from blockd.daemons.local_member import LocalSession
from blockd.loop import Loop
from protocol import replica as wire
from protocol.errors import (
    BlockdError,
    ConflictError,
    DegradedError,
    PeerError,
    StateError,
    StorageError,
)
from replication.authority import IN_SYNC, OUT, Authority, Member, Record
from replication.choosing import Choice, choose, is_stranger
from replication.lease import TAKEOVER_SECONDS
from replication.structure import (
    adopt_unrecorded,
    drop_layers,
    finish_revert,
    with_unknown_layers,
)

WAIT_SECONDS = 15.0  # for replica daemons that are being started together with us
RETRY_SECONDS = 0.2
TAKE_UP_SECONDS = 30.0  # a process that was killed lets go of a directory when its disk answers
TAKE_UP_RETRY_SECONDS = 0.01

Log = Callable[[str], None]
AnySession = Session | LocalSession


@dataclass
class Opened:
    """The outcome: the record as it is now, the fenced sessions, and how the members stand."""

    record: Record
    sessions: dict[str, AnySession]
    choice: Choice


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for."""

    name: str
    volume_uuid: str
    addresses: tuple[str, ...]
    key: bytes
    loop: Loop
    consumer_alive: bool = False  # whoever used the volume still does: never go back in time
    min_in_sync: int = 1  # of a new volume


def open_volume(authority: Authority, wanted: Wanted, log: Log) -> Opened:
    """Steps 1 to 6; blocking; raises the error that says why the volume cannot be opened."""
    found = (
        authority.load(wanted.volume_uuid) if wanted.volume_uuid else authority.find(wanted.name)
    )
    volume_uuid = found.volume_uuid if found else wanted.volume_uuid or str(uuid.uuid4())
    sessions = _introduce(wanted, volume_uuid, found, log)
    record = found or _create(authority, wanted, volume_uuid, sessions)
    _check_members(authority, record, sessions)
    _check_alike(record, sessions)
    was_clean = record.clean
    record = _with_addresses(record, sessions)
    record = _without_strangers(record, sessions, log)
    record = authority.swap(replace(record, epoch=record.epoch + 1, clean=False))
    promised = _fence(record, sessions, log)
    if not was_clean and not _all_fenced(record, promised):
        log("a replica cannot be reached: waiting until nobody can read from it any more")
        wanted.loop.sleep(TAKEOVER_SECONDS)
    choice = choose(record, promised, was_clean, wanted.consumer_alive)
    if not was_clean:
        log(f"volume {record.volume_name} was not closed cleanly: {choice.source} is the source")
    record = _finish_structure(record, sessions, promised, list(choice.in_sync), log)
    for replica_uuid, member in record.members.items():
        if member.state != OUT and replica_uuid not in choice.in_sync:
            log(f"replica {replica_uuid} is not known to be equal: OUT until it was compared")
            record = record.with_state(replica_uuid, OUT)
    record = authority.swap(replace(record, served_epoch=record.epoch))
    _trust(sessions, choice, log)
    return Opened(record, sessions, choice)


def _trust(sessions: dict[str, AnySession], choice: Choice, log: Log) -> None:
    """Tell the members in sync that they are; one that does not hear it counts as rebooted."""
    for replica_uuid in choice.in_sync:
        try:
            sessions[replica_uuid].ask(wire.CONTROL, {"do": "trust"})
        except (PeerError, StorageError) as error:
            log(f"replica {replica_uuid} was lost: {error}")  # its socket will say so again


def _without_strangers(record: Record, sessions: dict[str, AnySession], log: Log) -> Record:
    """Directories that are not the ones that took part are OUT, and compared as a whole."""
    for name, session in sessions.items():
        if is_stranger(record, name, session.hello):
            log(
                f"the directory of replica {name} knows of epoch "
                f"{session.hello['promised_epoch']} and {session.hello['size_bytes']} bytes only: "
                "it is empty, or an old copy; it will be compared and filled as a whole"
            )
            record = record.as_stranger(name)
    if not any(member.state == IN_SYNC for member in record.members.values()):
        raise DegradedError(
            f"no replica of volume {record.volume_name} that can be reached holds its data: their "
            "directories are empty or old copies; put the newest ones back in place"
        )
    return record


def _all_fenced(record: Record, promised: dict[str, dict[str, Any]]) -> bool:
    """Can an older owner not read from anybody any more?"""
    members = record.members.items()
    return all(name in promised for name, member in members if member.state == IN_SYNC)


def _introduce(
    wanted: Wanted, volume_uuid: str, found: Record | None, log: Log
) -> dict[str, AnySession]:
    """Sessions with all replicas that answer; waits a while for those that do not."""
    sessions: dict[str, AnySession] = {}
    left = dict.fromkeys(wanted.addresses)
    loop = wanted.loop
    deadline = loop.now() + WAIT_SECONDS
    error: BlockdError | None = None
    while left:
        for address in list(left):
            try:
                session = introduce(loop, address, volume_uuid, wanted.key)
            except (PeerError, StorageError) as failure:
                error = failure
                continue
            del left[address]
            replica_uuid = str(session.hello["replica_uuid"])
            if replica_uuid in sessions:
                raise ConflictError(f"replica {replica_uuid} was named twice ({address})")
            sessions[replica_uuid] = session
        enough = found is not None and all(
            uuid in sessions for uuid, member in found.members.items() if member.state == IN_SYNC
        )
        if not left or enough or loop.now() > deadline:
            break
        loop.sleep(RETRY_SECONDS)
    for address in left:
        log(f"replica at {address} does not answer: {error}")
    if left and found is None:
        raise DegradedError(
            f"a new volume needs all its replicas; no answer at {', '.join(left)}: {error}"
        )
    return sessions


def introduce(loop: Loop, address: str, volume_uuid: str, key: bytes) -> AnySession:
    """A session with the replica at `address`: a daemon, or `dir:PATH` in this process."""
    if address.startswith("dir:"):
        return LocalSession(loop, address[4:], volume_uuid)
    return Session(loop, address, volume_uuid, key)


def take_up(loop: Loop, address: str, record: Record) -> LocalSession:
    """Open a replica in this process that was in sync and closed by who had it in this epoch.

    `service.clean_start` tells whether it was closed cleanly.
    """
    deadline = loop.now() + TAKE_UP_SECONDS
    while True:
        try:
            session = LocalSession(loop, address.removeprefix("dir:"), record.volume_uuid)
            break
        except ConflictError:  # who had it has not ended yet
            if loop.now() > deadline:
                raise
            loop.sleep(TAKE_UP_RETRY_SECONDS)
    session.hello = session.fence(fence_content(record))
    session.ask(wire.CONTROL, {"do": "trust"})
    return session


def _create(
    authority: Authority, wanted: Wanted, volume_uuid: str, sessions: dict[str, AnySession]
) -> Record:
    """The first record of a volume opened by hand: all replicas blank and of one size."""
    if not sessions:
        raise DegradedError(f"volume {wanted.name} has no replica; name some with --replica")
    sizes = {session.hello["size_bytes"] for session in sessions.values()}
    if len(sizes) > 1:
        raise ConflictError(
            f"the replicas of volume {wanted.name} have different sizes {sorted(sizes)}; "
            "create them with one size"
        )
    for session in sessions.values():
        hello = session.hello
        if hello["volume_uuid"] and hello["promised_epoch"]:
            raise ConflictError(
                f"the replica at {session.address} holds data of volume {hello['volume_name']} "
                "but the state file does not know it; use the state file it was written with"
            )
    return authority.create(
        Record(
            volume_uuid=volume_uuid,
            volume_name=wanted.name,
            size_bytes=sizes.pop(),
            min_in_sync=wanted.min_in_sync,
            members={
                replica_uuid: Member(IN_SYNC, session.address)
                for replica_uuid, session in sessions.items()
            },
        )
    )


def _check_members(authority: Authority, record: Record, sessions: dict[str, AnySession]) -> None:
    for replica_uuid, session in list(sessions.items()):
        hello = session.hello
        if replica_uuid not in record.members:
            raise ConflictError(
                f"replica {replica_uuid} at {session.address} is no member of volume "
                f"{record.volume_name}; add it with `blockd replica add`, or leave it out"
            )
        if hello["config_seq"] > record.config_seq or hello["promised_epoch"] > record.epoch:
            newest = authority.load(record.volume_uuid)
            if newest is None or newest.version != record.version:
                raise ConflictError(
                    f"volume {record.volume_name} is being opened by another volume daemon"
                )
            raise ConflictError(
                f"replica {replica_uuid} has seen epoch {hello['promised_epoch']} and "
                f"configuration {hello['config_seq']}, the record of volume {record.volume_name} "
                f"only {record.epoch} and {record.config_seq}: the record is older than the data; "
                "restore the newest one"
            )
    if not any(
        member.state == IN_SYNC and replica_uuid in sessions
        for replica_uuid, member in record.members.items()
    ):
        states = ", ".join(
            f"{uuid} {member.state} {'reachable' if uuid in sessions else 'unreachable'}"
            for uuid, member in record.members.items()
        )
        raise DegradedError(
            f"volume {record.volume_name} has no reachable replica in sync ({states}); start the "
            "replica daemon of one that is IN_SYNC"
        )


def _check_alike(record: Record, sessions: dict[str, AnySession]) -> None:
    """Refuse directories that do not belong together; before anything else has changed."""
    if not record.clean or record.pending is not None:
        return
    heads = {
        session.hello["head_id"]
        for name, session in sessions.items()
        if record.members[name].state == IN_SYNC
        and session.hello["complete"]
        and not is_stranger(record, name, session.hello)
    }
    if len(heads) > 1:
        raise StateError(
            f"the replicas of volume {record.volume_name} do not have the same layers although it "
            "was closed cleanly; take those out that do not belong to it"
        )


def _with_addresses(record: Record, sessions: dict[str, AnySession]) -> Record:
    members = dict(record.members)
    for replica_uuid, session in sessions.items():
        members[replica_uuid] = replace(members[replica_uuid], address=session.address)
    return replace(record, members=members)


def _fence(record: Record, sessions: dict[str, AnySession], log: Log) -> dict[str, dict[str, Any]]:
    """What every fenced member says of itself after its older sessions ended."""
    promised = {}
    for replica_uuid, session in list(sessions.items()):
        try:
            promised[replica_uuid] = session.fence(fence_content(record))
        except (PeerError, StorageError) as error:
            log(f"replica {replica_uuid} was lost while it was fenced: {error}")
            del sessions[replica_uuid]
    return promised


def fence_content(record: Record) -> dict[str, Any]:
    """The FENCE request of the record's epoch."""
    return {
        "epoch": record.epoch,
        "volume_uuid": record.volume_uuid,
        "volume_name": record.volume_name,
        "config_seq": record.config_seq,
        "config": {replica_uuid: member.state for replica_uuid, member in record.members.items()},
    }


def _finish_structure(
    record: Record,
    sessions: dict[str, AnySession],
    promised: dict[str, dict[str, Any]],
    equal: list[str],
    log: Log,
) -> Record:
    """Finish a snapshot, delete or revert that was under way, on every equal member."""
    pending = record.pending
    if pending is not None:
        log(f"finishing the revert to layer {pending['layer_id']}")
        for replica_uuid in equal:
            if promised[replica_uuid]["head_id"] != pending["new_head_id"]:
                content = {"do": "revert", **pending}
                promised[replica_uuid]["layers"] = _apply(sessions[replica_uuid], content)
                promised[replica_uuid]["head_id"] = pending["new_head_id"]
        record = finish_revert(record)
    record = adopt_unrecorded(record, promised[equal[0]])
    for replica_uuid in equal:
        record = with_unknown_layers(record, promised[replica_uuid]["layers"])
    present: set[int] = set()
    for replica_uuid in equal:
        layers = {layer["id"]: layer for layer in promised[replica_uuid]["layers"]}
        present.update(layers)
        for layer in record.layers:
            if layer.id not in layers and not layer.removed:
                raise StateError(
                    f"replica {replica_uuid} lacks snapshot {record.volume_name}@{layer.name} "
                    "that the record has; take this replica out and open the volume again"
                )
            if layer.removed and layer.id in layers and not layers[layer.id]["removed"]:
                _apply(sessions[replica_uuid], {"do": "remove", "layer_id": layer.id})
    gone = [layer.id for layer in record.layers if layer.removed and layer.id not in present]
    return drop_layers(record, gone)


def _apply(session: AnySession, content: dict[str, Any]) -> list[dict[str, Any]]:
    """One control request, made durable; the layers after it."""
    session.ask(wire.CONTROL, content)
    session.ask(wire.FLUSH, {})
    layers: list[dict[str, Any]] = session.ask(wire.CONTROL, {"do": "tree"})["layers"]
    return layers
