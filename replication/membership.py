"""Members come and go: the rules around `targets` and `readers`.

A member that fails stops being read at once, and holds answers back until the record says OUT:
if this process dies before, the next owner still counts on a member that missed no acknowledged
write; if it dies after, the member is known to be behind. The last IN_SYNC member is never marked
OUT: without it every request fails with EIO until it is back.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protocol import replica as wire
from protocol.errors import BlockdError, PeerError, StateError
from replication.authority import IN_SYNC, OUT, SYNCING, Record

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link


def fail(engine: Engine, link: Link, reason: str) -> None:
    """End a member's part in the volume; safe to call again."""
    if not link.connected:
        return
    link.connected = False
    link.failure = reason
    engine.set_readers([reader for reader in engine.readers if reader is not link])
    engine.on_lost(link, reason)
    reads, link.reads = link.reads, {}
    for asked in reads.values():
        engine.send_reads(asked)
    link.fail_calls(PeerError(f"replica {link.replica_uuid} was lost: {reason}"))
    if link.rebuild is not None:
        link.rebuild.abort(f"the replica was lost: {reason}")
    if link not in engine.targets:
        if link.state == SYNCING and not link.leaving:  # lost before its barrier
            put_out(engine, link)
        engine.on_members()
    elif link.state == IN_SYNC and not _others_in_sync(engine, link):
        _lose_last(engine)
    else:
        put_out(engine, link)


def _others_in_sync(engine: Engine, link: Link) -> bool:
    return any(
        other is not link and other.state == IN_SYNC and other.connected for other in engine.targets
    )


def _lose_last(engine: Engine) -> None:
    """No copy is left that may answer: fail what is under way, drop unfinished rebuilds."""
    syncing = [link for link in engine.targets if link.state not in (IN_SYNC, OUT)]
    engine.fail_all(errno.EIO)
    engine.set_members([], [])
    for link in syncing:
        fail(engine, link, "the last replica in sync was lost during the rebuild")
        put_out(engine, link)


def put_out(engine: Engine, link: Link) -> None:
    """Record a member as OUT, then stop waiting for it."""
    link.leaving = True

    def change(record: Record) -> Record:
        others = [
            uuid
            for uuid, member in record.members.items()
            if uuid != link.replica_uuid and member.state == IN_SYNC
        ]
        member = record.members.get(link.replica_uuid)
        if member is None or member.state == OUT:
            return record
        if not others:
            raise StateError(
                f"replica {link.replica_uuid} is the last one in sync and stays a member"
            )
        return record.with_state(link.replica_uuid, OUT)

    def done(error: BlockdError | None) -> None:
        link.leaving = False
        if error is not None:  # meanwhile it became the last one in sync
            _lose_last(engine)
        else:
            link.state = OUT
            engine.count_in_sync()  # it may be a target for a while, but not one that counts
            tell_config(engine, leave, besides=link)

    def leave() -> None:
        engine.set_members(
            [target for target in engine.targets if target is not link],
            [reader for reader in engine.readers if reader is not link],
        )

    engine.ledger.change(change, done)


def tell_config(engine: Engine, done: Callable[[], None], besides: Link | None = None) -> None:
    """Every target remembers the newest configuration, durably, then `done()`.

    Whoever opens the volume with an older record than that will be refused (rule 11).
    """
    waiting = [link for link in engine.targets if link is not besides and link.connected]
    content = {"do": "config", "config_seq": engine.record.config_seq}

    def told(link: Link) -> None:
        waiting.remove(link)
        if not waiting:
            done()

    if not waiting:
        done()
    for link in list(waiting):
        _tell(engine, link, content, told)


def _tell(
    engine: Engine, link: Link, content: dict[str, Any], told: Callable[[Link], None]
) -> None:
    def reply(argument: int, payload: memoryview | None, error: BlockdError | None) -> None:
        if error is not None and link.connected:
            fail(engine, link, f"it could not remember the members: {error}")
        told(link)

    engine.call(link, wire.CONTROL, reply, content=content)


def enter(engine: Engine, link: Link) -> None:
    """A connected IN_SYNC member takes part: writes from now on, and reads."""
    link.applied = engine.sequence
    link.connected = True
    link.failure = None
    engine.set_members([*engine.targets, link], [*engine.readers, link])


def enter_syncing(engine: Engine, link: Link) -> None:
    """A member being rebuilt gets every write from now on, and no reads."""
    link.applied = engine.sequence
    engine.set_members([*engine.targets, link], engine.readers)
