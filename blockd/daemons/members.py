"""The members of an open volume: their sockets, who comes back, who is watched and made equal.

A member that is lost is tried again every RECONNECT_SECONDS. What it may do then depends on the
record: OUT members are made equal (replication/rebuild.py), the last one in sync takes part again
if its machine has not been rebooted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from blockd.daemons import opening, process
from blockd.daemons.handshake import GivenSession, Session
from blockd.daemons.local_member import LocalMember, LocalSession
from blockd.daemons.member_socket import MemberSocket
from protocol.errors import BlockdError, ConflictError, StateError, StorageError
from replication import membership
from replication.authority import IN_SYNC, OUT, SYNCING
from replication.choosing import is_stranger
from replication.link import Link
from replication.pace import Pace
from replication.rebuild import Rebuild
from replication.returning import come_back
from replication.scrub import Report, Scrub
from replication.watch import LOOK_SECONDS, Watch

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon

RECONNECT_SECONDS = 1.0
RECONNECTS_MAX = 2  # at a time: a host that hangs holds a worker thread for seconds
RESYNC_SECONDS = 1.0  # before a returning member is made equal again; doubled each time
RESYNC_SECONDS_MAX = 300.0
STEADY_SECONDS = 60.0  # in sync for so long, a member is as good as new


Introduced = opening.AnySession | GivenSession


class _Stranger(StateError):
    """The directory is not the one that took part: it is compared as a whole."""


class Members:
    """All members of one volume daemon."""

    def __init__(self, daemon: VolumeDaemon, sessions: Mapping[str, Introduced]) -> None:
        self._daemon = daemon
        self._loop = daemon.loop
        self._engine = engine = daemon.engine
        self.sockets: dict[Link, MemberSocket | LocalMember] = {}
        self._boot_ids: dict[str, str] = {}
        self._reconnecting: set[str] = set()
        self._watch = Watch(engine, daemon.options.answer_seconds_max)
        self.bytes_per_second = daemon.options.rebuild_bytes_per_second
        self._resync_at: dict[str, float] = {}
        self._resync_delay: dict[str, float] = {}
        self._in_sync_since: dict[str, float] = {}
        self.verified: Report | None = None  # the last or running verification
        engine.repairs.on_event = process.log
        engine.on_lost = self._lost
        for replica_uuid, member in engine.record.members.items():
            link = Link(replica_uuid, member.address, member.state)
            engine.links[replica_uuid] = link
            session = sessions.get(replica_uuid)
            if session is not None:
                self._connected(link, session)
                if link.state == IN_SYNC:
                    membership.enter(engine, link)
        self._loop.later(RECONNECT_SECONDS, self._tick)
        self._loop.later(LOOK_SECONDS, self._look)

    def close(self) -> None:
        """Close all sockets."""
        for link in list(self.sockets):
            self.sockets.pop(link).close()

    def close_local(self) -> None:
        """Close the replicas in this process, because another one opens them.

        StorageError if one of them cannot be made durable.
        """
        for member in self.sockets.values():
            if isinstance(member, LocalMember) and not member.close():
                raise StorageError(
                    f"replica {member.link.replica_uuid} could not be closed cleanly"
                )

    def open_local(self) -> bool:
        """Go on with the replicas that `close_local` closed; False: this process has to end."""
        engine = self._engine
        for old in [link for link, member in self.sockets.items() if not member.is_open]:
            try:
                session = opening.take_up(self._loop, old.address, engine.record)
            except BlockdError as error:
                process.log(f"replica {old.replica_uuid} cannot be opened again: {error}")
                self._daemon.exit_code = error.exit_code
                self._loop.stop()
                return False
            del self.sockets[old]
            link = Link(old.replica_uuid, old.address, old.state)
            link.errors, link.repaired_blocks = old.errors, old.repaired_blocks
            engine.links[link.replica_uuid] = link
            engine.set_members(
                [target for target in engine.targets if target is not old],
                [reader for reader in engine.readers if reader is not old],
            )
            self._connected(link, session)
            membership.enter(engine, link)
        return True

    def _connected(self, link: Link, session: Introduced) -> None:
        link.hello = session.hello
        link.address = session.address
        self._boot_ids.setdefault(link.replica_uuid, str(session.hello["boot_id"]))
        if isinstance(session, LocalSession):
            self.sockets[link] = LocalMember(self._daemon, link, session)
        else:
            self.sockets[link] = MemberSocket(self._daemon, link, session.detach())
        link.connected = True

    def _lost(self, link: Link, reason: str) -> None:
        process.log(f"replica {link.replica_uuid} at {link.address} lost: {reason}")
        member = self.sockets.pop(link, None)
        if member is not None:
            member.close()
        self._loop.post(self._daemon.member_drained)

    # ---- watching -------------------------------------------------------------------------

    def _look(self) -> None:
        if not self._daemon.stopping:
            if not self._watch.idle:
                self._watch.look(self._loop.now())
                self._daemon.send_everything()
            self._loop.later(LOOK_SECONDS, self._look)

    def _tick(self) -> None:
        if self._daemon.stopping:
            return
        now = self._loop.now()
        for link in list(self._engine.links.values()):
            if not link.connected:
                self.reconnect(link.replica_uuid)
            elif not self._daemon.handing_over:
                self._resync(link, now)
        structure = self._daemon.structure
        if not structure.busy:
            structure.forget_folded()
        self._daemon.send_everything()
        self._loop.later(RECONNECT_SECONDS, self._tick)

    # ---- coming back ----------------------------------------------------------------------

    def reconnect(self, replica_uuid: str) -> None:
        """Try to reach a lost member; what it may do afterwards depends on the record."""
        record = self._engine.record
        link = self._engine.links.get(replica_uuid)
        member = record.members.get(replica_uuid)
        if link is None or member is None or replica_uuid in self._reconnecting:
            return
        if self._daemon.handing_over:
            return
        if member.state != link.state or link.leaving or link in self._engine.targets:
            return  # its change to OUT is still on the way
        if len(self._reconnecting) >= RECONNECTS_MAX:
            return
        if link.is_local:
            return  # its disk failed under this process; only a restart looks at it again
        self._reconnecting.add(replica_uuid)
        loop, address, key = self._loop, link.address, self._daemon.options.key

        def work() -> Session:
            session = Session(loop, address, record.volume_uuid, key)
            found = session.hello["replica_uuid"]
            if found != replica_uuid:
                session.socket.close()
                raise ConflictError(f"{address} serves replica {found}, not {replica_uuid}")
            if is_stranger(record, replica_uuid, session.hello):
                session.socket.close()
                raise _Stranger(
                    "its directory is empty or an old copy, not the one that was in sync; put that "
                    "one back in place"
                )
            session.hello = session.fence(opening.fence_content(record))
            return session

        def done(session: Session | None, failure: BaseException | None) -> None:
            self._reconnecting.discard(replica_uuid)
            if failure is not None or session is None:
                link.failure = str(failure)
                if isinstance(failure, _Stranger) and member.state != IN_SYNC:
                    self._engine.ledger.change(
                        lambda record: record.as_stranger(replica_uuid), lambda error: None
                    )
                if isinstance(failure, ConflictError):
                    # It refuses our epoch, perhaps: a swap finds out whether we were fenced.
                    self._engine.ledger.change(lambda record: record, lambda error: None)
                return
            self._reconnected(link, session)

        loop.in_thread(work, done)

    def _reconnected(self, old: Link, session: Session) -> None:
        replica_uuid, engine = old.replica_uuid, self._engine
        member = engine.record.members.get(replica_uuid)
        if member is None or old.connected or engine.links.get(replica_uuid) is not old:
            session.socket.close()
            return
        boot_id = str(session.hello["boot_id"])
        if member.state == IN_SYNC and old.distrusted:
            old.failure = (
                "its disk failed to make data durable and no other replica is in sync; check the "
                "disk, then detach the volume and attach it again to go on from what is there"
            )
            session.socket.close()
            return
        if member.state == IN_SYNC and boot_id != self._boot_ids.get(replica_uuid):
            old.failure = (
                "its host was restarted and may have lost writes that were not flushed; "
                "detach the volume and attach it again to go on from what is on the disk"
            )
            session.socket.close()
            return
        link = Link(replica_uuid, session.address, member.state)
        link.errors = old.errors
        engine.links[replica_uuid] = link
        self._boot_ids[replica_uuid] = boot_id
        process.log(f"replica {replica_uuid} is back ({member.state})")
        self._connected(link, session)
        if link.state == IN_SYNC:
            come_back(engine, link)
        self._daemon.send_everything()

    # ---- becoming equal -------------------------------------------------------------------

    def _resync(self, link: Link, now: float) -> None:
        """Make a member equal that is OUT; one that keeps failing waits longer."""
        uuid = link.replica_uuid
        member = self._engine.record.members.get(uuid)
        if link.state == IN_SYNC:
            since = self._in_sync_since.setdefault(uuid, now)
            if now - since > STEADY_SECONDS:
                self._resync_delay.pop(uuid, None)
            return
        self._in_sync_since.pop(uuid, None)
        if member is None or member.state != OUT or link.leaving:
            return
        if link.state != OUT or link in self._engine.targets or not self._engine.readers:
            return
        if now < self._resync_at.get(uuid, 0.0):
            return
        delay = self._resync_delay.get(uuid, RESYNC_SECONDS)
        self._resync_at[uuid] = now + delay
        self._resync_delay[uuid] = min(2 * delay, RESYNC_SECONDS_MAX)
        try:
            self._rebuild(link)
        except BlockdError as error:
            link.failure = str(error)

    def rebuild_now(self, link: Link) -> None:
        """Start to make a member equal, whatever it waits for; raises if that cannot begin."""
        if link.state == SYNCING:
            return
        self._resync_at.pop(link.replica_uuid, None)
        self._resync_delay.pop(link.replica_uuid, None)
        self._rebuild(link)

    def _rebuild(self, link: Link) -> None:
        pace = Pace(self._engine.latency, self._later, lambda: self.bytes_per_second)

        def done(error: BlockdError | None) -> None:
            copied = rebuild.copied_bytes >> 20
            result = f"failed: {error}" if error else f"in sync, {copied} MiB copied"
            process.log(f"rebuild of replica {link.replica_uuid}: {result}")

        rebuild = Rebuild(self._engine, link, done, pace)
        rebuild.start()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._loop.later(seconds, self._daemon.sending(call))

    # ---- verifying ------------------------------------------------------------------------

    def verify(self) -> None:
        """Begin to compare all members, block by block; `verified` is its report."""

        def done(report: Report) -> None:
            process.log(
                f"verified {report.checked_blocks} blocks in {report.seconds:.0f} s: "
                f"{report.bad_blocks} bad, {report.repaired_blocks} repaired, "
                f"{report.differing_blocks} differing"
                + (f"; ended early: {report.error}" if report.error else "")
            )

        scrub = Scrub(self._engine, done, Pace(self._engine.latency, self._later))
        scrub.start()
        self.verified = scrub.report
