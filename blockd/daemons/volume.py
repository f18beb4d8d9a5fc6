"""The volume daemon: the one process that owns an open volume.

It wires the engine to sockets: NBD clients on one side, a session per replica on the other, the
authority in a worker thread, a control socket for its node service. Everything but the authority
and reconnecting runs in the loop.

If the process dies, answered writes are on every member that the record calls IN_SYNC; the next
open fences this one and compares the members (opening.py).
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Sequence
from dataclasses import replace

from blockd.daemons import opening, process
from blockd.daemons.control import ControlServer
from blockd.daemons.handshake import Session
from blockd.daemons.local_member import LocalMember, LocalSession
from blockd.daemons.member_socket import MemberSocket
from blockd.daemons.nbd_server import NbdConnection, NbdServer
from blockd.daemons.volume_commands import VolumeCommands
from blockd.loop import Loop
from protocol.errors import (
    BlockdError,
    ConflictError,
    NotFoundError,
    RequestError,
    StateError,
)
from protocol.nbd.exports import Export
from protocol.units import check_name
from replication import membership
from replication.authority import IN_SYNC, SqliteAuthority
from replication.engine import Engine
from replication.ledger import Ledger
from replication.link import Link
from replication.returning import come_back
from replication.structure import Structure

TICK_SECONDS = 1.0  # how often silence is noticed and lost members are tried again
SILENCE_SECONDS_MAX = 20.0  # a member that owes answers this long is OUT; above a slow disk's flush
RECONNECTS_MAX = 2  # at a time: a host that hangs holds a worker thread for seconds
STOP_SECONDS_MAX = 15.0  # for the last answers and the last flush
CONGESTION_BYTES = 16 << 20  # unsent bytes of one member after which clients are not read
FENCED_EXIT_CODE = ConflictError.exit_code


class VolumeDaemon:
    """One open volume and everything connected to it."""

    def __init__(
        self, loop: Loop, authority: SqliteAuthority, opened: opening.Opened, options: Options
    ) -> None:
        self.loop = loop
        self.options = options
        self.ledger = Ledger(authority, opened.record, loop, self._fenced)
        self.ledger.on_change = self.send_everything
        self.engine = Engine(self.ledger, loop.now)
        self.structure = Structure(self.engine, process.timestamp)
        self.connections: list[NbdConnection] = []
        self.waiting: list[NbdConnection] = []
        self.servers: list[NbdServer] = []
        self.congested = False
        self.exit_code = 0
        self.started = process.timestamp()
        self._sockets: dict[Link, MemberSocket | LocalMember] = {}
        self._boot_ids: dict[str, str] = {}
        self._reconnecting: set[str] = set()
        self.stopping = False
        self._control: ControlServer | None = None
        self.engine.on_lost = self._member_lost
        for replica_uuid, member in opened.record.members.items():
            link = Link(replica_uuid, member.address, member.state)
            self.engine.links[replica_uuid] = link
            session = opened.sessions.get(replica_uuid)
            if session is not None:
                self._connected(link, session)
                if link.state == IN_SYNC:
                    membership.enter(self.engine, link)
        loop.later(TICK_SECONDS, self._tick)

    def serve(self) -> None:
        """Start listening."""
        for address in self.options.nbd:
            self.servers.append(NbdServer(self, address))
        if self.options.control:
            commands = VolumeCommands(self).table()
            self._control = ControlServer(self.loop, self.options.control, commands)

    # ---- exports (ExportSource of the NBD handshake) ----------------------------------------

    def list(self) -> Sequence[str]:
        """The live volume, then its snapshots."""
        record = self.engine.record
        names = [f"{record.volume_name}@{layer.name}" for layer in record.layers if layer.name]
        return [record.volume_name, *names]

    def find(self, name: str) -> Export | None:
        """The export of that name; the empty name is the live volume."""
        record = self.engine.record
        volume, at, snapshot = name.partition("@")
        if volume not in ("", record.volume_name):
            return None
        if at and record.layer_named(snapshot) is None:
            return None
        return Export(
            name=f"{record.volume_name}@{snapshot}" if at else record.volume_name,
            size_bytes=record.size_bytes,
            read_only=bool(at),
            minimum_block=1,  # smaller writes are completed to whole blocks here
            preferred_block=self.options.block_size,
            description=f"snapshot {snapshot}" if at else "live volume",
        )

    def layer_of(self, export_name: str) -> int:
        """The layer a client of `export_name` reads; 0 is the live volume."""
        _, at, snapshot = export_name.partition("@")
        return self.structure.find(snapshot).id if at else 0

    def readers_of(self, layer_id: int) -> int:
        """How many clients use the export of a snapshot."""
        return sum(1 for connection in self.connections if connection.layer_id == layer_id)

    # ---- sending --------------------------------------------------------------------------

    def send_to_members(self) -> bool:
        """Send all outboxes of members; True if nothing is left in them."""
        sent = True
        for member in tuple(self._sockets.values()):  # one that fails to send leaves
            if member.link.queue and not member.flush():
                sent = False
        if not sent:
            self._look_for_congestion()
        return sent

    def _look_for_congestion(self) -> None:
        self.congested = any(
            member.link.outbox.size_bytes() > CONGESTION_BYTES for member in self._sockets.values()
        )

    def send_to_clients(self) -> bool:
        """Send all outboxes of clients; True if nothing is left in them."""
        sent = True
        for connection in tuple(self.connections):
            if connection.outbox.queue and not connection.flush():
                sent = False
            if connection.backlog:
                self.loop.post(connection.go_on)
        return sent

    def send_everything(self) -> bool:
        """Members first (a local one answers at once), then clients; True if those took all."""
        self.send_to_members()
        return self.send_to_clients()

    def answers_waiting(self) -> bool:
        """Does any client still have unsent answers?"""
        for connection in self.connections:  # noqa: SIM110 - a generator costs more than the loop
            if connection.outbox.queue:
                return True
        return False

    def member_drained(self) -> None:
        """A member took what was waiting for it."""
        self._look_for_congestion()
        if not self.congested:
            waiting, self.waiting = self.waiting, []
            for connection in waiting:
                connection.resume()

    def connection_closed(self, connection: NbdConnection, reason: str) -> None:
        """Forget an NBD client."""
        if connection in self.connections:
            self.connections.remove(connection)
        process.log(f"NBD client left: {reason}")

    # ---- members --------------------------------------------------------------------------

    def _connected(self, link: Link, session: opening.AnySession) -> None:
        link.hello = session.hello
        link.address = session.address
        link.progress_at = self.loop.now()
        self._boot_ids.setdefault(link.replica_uuid, str(session.hello["boot_id"]))
        if isinstance(session, LocalSession):
            self._sockets[link] = LocalMember(self, link, session)
        else:
            self._sockets[link] = MemberSocket(self, link, session.detach())
        link.connected = True

    def _member_lost(self, link: Link, reason: str) -> None:
        process.log(f"replica {link.replica_uuid} at {link.address} lost: {reason}")
        member = self._sockets.pop(link, None)
        if member is not None:
            member.close()
        self.loop.post(self.member_drained)

    def _tick(self) -> None:
        if self.stopping:
            return
        now = self.loop.now()
        engine = self.engine
        oldest = engine.pending[0][0] if engine.pending else None
        for link in list(engine.links.values()):
            if not link.connected:
                self.reconnect(link.replica_uuid)
                continue
            owes_write = oldest is not None and link in engine.targets and link.applied < oldest
            local = link.address.startswith("dir:")  # in this process: silence means nothing
            if local or not (link.reads or link.calls or owes_write):
                link.progress_at = now
            elif now - link.progress_at > SILENCE_SECONDS_MAX:
                engine.fail(link, f"no answer for {SILENCE_SECONDS_MAX:.0f} s")
        if not self.structure.busy:
            self.structure.forget_folded()
        self.send_everything()
        self.loop.later(TICK_SECONDS, self._tick)

    def reconnect(self, replica_uuid: str) -> None:
        """Try to reach a lost member; what it may do afterwards depends on the record."""
        record = self.engine.record
        link = self.engine.links.get(replica_uuid)
        member = record.members.get(replica_uuid)
        if link is None or member is None or replica_uuid in self._reconnecting:
            return
        if member.state != link.state or link.leaving or link in self.engine.targets:
            return  # its change to OUT is still on the way
        if len(self._reconnecting) >= RECONNECTS_MAX:
            return
        if link.address.startswith("dir:"):
            return  # its disk failed under this process; only a restart looks at it again
        self._reconnecting.add(replica_uuid)
        address, key = link.address, self.options.key

        def work() -> Session:
            session = Session(self.loop, address, record.volume_uuid, key)
            found = session.hello["replica_uuid"]
            if found != replica_uuid:
                session.socket.close()
                raise ConflictError(f"{address} serves replica {found}, not {replica_uuid}")
            session.hello = session.fence(opening.fence_content(record))
            return session

        def done(session: Session | None, failure: BaseException | None) -> None:
            self._reconnecting.discard(replica_uuid)
            if failure is not None or session is None:
                link.failure = str(failure)
                if isinstance(failure, ConflictError):
                    # It refuses our epoch, perhaps: a swap finds out whether we were fenced.
                    self.ledger.change(lambda record: record, lambda error: None)
                return
            self._reconnected(link, session)

        self.loop.in_thread(work, done)

    def _reconnected(self, old: Link, session: Session) -> None:
        replica_uuid = old.replica_uuid
        member = self.engine.record.members.get(replica_uuid)
        if member is None or old.connected or self.engine.links.get(replica_uuid) is not old:
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
        self.engine.links[replica_uuid] = link
        self._boot_ids[replica_uuid] = boot_id
        process.log(f"replica {replica_uuid} is back ({member.state})")
        self._connected(link, session)
        if link.state == IN_SYNC:
            come_back(self.engine, link)
        self.send_everything()

    # ---- the end --------------------------------------------------------------------------

    def _fenced(self, reason: str) -> None:
        process.log(reason)
        self.exit_code = FENCED_EXIT_CODE
        self.loop.stop()

    def stop(self) -> None:
        """Answer what is under way, flush, record the clean end, leave the loop."""
        if self.stopping:
            return
        self.stopping = True
        for server in self.servers:
            server.close()
        self.loop.later(STOP_SECONDS_MAX, self._give_up)
        self._drain()

    def _drain(self) -> None:
        engine = self.engine
        if engine.pending or engine.locks.held or self.structure.busy or engine.rebuilds:
            for rebuild in list(engine.rebuilds):
                rebuild.abort("the volume daemon stops")
            self.send_everything()
            self.loop.later(0.02, self._drain)
            return
        for connection in list(self.connections):
            connection.close("the volume daemon stops")
        self.engine.flush_then(self._flushed)
        self.send_to_members()

    def _flushed(self, error: BlockdError | None) -> None:
        if error is not None:
            process.log(f"stopped without a clean end: {error}")
            self.loop.stop()
            return
        self.ledger.change(lambda record: replace(record, clean=True), lambda e: self.loop.stop())

    def _give_up(self) -> None:
        process.log(f"stopped without a clean end: not done after {STOP_SECONDS_MAX:.0f} s")
        self.exit_code = 1
        self.loop.stop()

    def close(self) -> None:
        """Close what is still open."""
        if self._control is not None:
            self._control.close()
        for link in list(self._sockets):
            self._sockets.pop(link).close()


class Options:
    """The command line, checked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name = check_name("volume", arguments.name)
        self.replicas: tuple[str, ...] = tuple(arguments.replica)
        self.nbd: tuple[str, ...] = tuple(arguments.nbd or ())
        self.state: str = arguments.state or f"{self.name}.db"
        self.volume_uuid: str = arguments.volume_uuid
        self.key = process.read_key(arguments.key_file)
        self.control: str | None = arguments.control
        self.block_size: int = arguments.block_size
        self.pid_file: str | None = arguments.pid_file
        if len(set(self.replicas)) < len(self.replicas):
            raise RequestError("a replica is named twice; every copy needs an address of its own")
        if not self.nbd and not self.control:
            raise RequestError("nobody could reach the volume; give --nbd or --control")
        if self.volume_uuid:
            try:
                uuid.UUID(self.volume_uuid)
            except ValueError:
                raise RequestError(f"--volume-uuid {self.volume_uuid!r} is no UUID") from None
        directory = os.path.dirname(os.path.abspath(self.state))
        if not os.path.isdir(directory):
            raise NotFoundError(f"directory {directory} of the state file does not exist")


def parser() -> argparse.ArgumentParser:
    """The arguments of `blockd daemon volume`."""
    parse = argparse.ArgumentParser(
        prog="blockd daemon volume",
        description="Own a volume: serve it over NBD and drive its replicas.",
        epilog="example: blockd daemon volume data --replica 127.0.0.1:9601 "
        "--replica 127.0.0.1:9602 --nbd unix:/tmp/data.sock --state /var/lib/data.db",
    )
    parse.add_argument("name", metavar="NAME", help="name of the volume, also its export name")
    parse.add_argument(
        "--replica",
        action="append",
        required=True,
        metavar="ADDRESS",
        help="a replica (repeat): unix:PATH or HOST:PORT of its daemon, or dir:PATH here",
    )
    parse.add_argument(
        "--nbd", action="append", metavar="ADDRESS", help="listen for NBD clients (repeat)"
    )
    parse.add_argument("--state", metavar="FILE", help="SQLite file of member states (NAME.db)")
    parse.add_argument("--volume-uuid", default="", help="the volume in that file, or of a new one")
    parse.add_argument("--key-file", help="secret shared with the replica daemons")
    parse.add_argument("--control", metavar="unix:PATH", help="control socket")
    parse.add_argument("--block-size", type=int, choices=(512, 4096), default=4096)
    parse.add_argument("--pid-file", help="write the process id here")
    return parse


def main(arguments: list[str]) -> int:
    """Open the volume and serve it until told to stop."""
    parsed = parser().parse_args(arguments)

    def serve() -> int:
        options = Options(parsed)
        authority = SqliteAuthority(options.state)
        loop = Loop()
        wanted = opening.Wanted(
            options.name, options.volume_uuid, options.replicas, options.key, loop
        )
        opened = opening.open_volume(authority, wanted, process.log)
        if opened.record.volume_name != options.name:
            raise StateError(
                f"volume {options.volume_uuid} is named {opened.record.volume_name}, not "
                f"{options.name}"
            )
        daemon = VolumeDaemon(loop, authority, opened, options)
        daemon.serve()
        process.on_signals(loop, daemon.stop)
        process.write_pid_file(options.pid_file)
        where = ", ".join(server.address for server in daemon.servers) or "no NBD address"
        print(f"ready volume {options.name} on {where}", flush=True)
        loop.run()
        daemon.close()
        return daemon.exit_code

    return process.run(serve)
