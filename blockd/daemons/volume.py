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
from collections.abc import Callable, Sequence
from dataclasses import replace

from blockd.daemons import opening, process
from blockd.daemons.block_status import CHANGED_CONTEXT
from blockd.daemons.control import ControlServer
from blockd.daemons.members import Members
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
from protocol.nbd import constants as nbd
from protocol.nbd.exports import Export
from protocol.units import check_min_in_sync, check_name, parse_rate
from replication.authority import Authority, SqliteAuthority
from replication.catchup import CatchUp
from replication.choosing import Choice
from replication.engine import Engine
from replication.ledger import Ledger
from replication.room import WAITING_BYTES_MAX
from replication.structure import Structure
from replication.watch import ANSWER_SECONDS_MAX

STOP_SECONDS_MAX = 15.0  # for the last answers and the last flush
CONGESTION_BYTES = 16 << 20  # unsent bytes of one member after which clients are not read
FENCED_EXIT_CODE = ConflictError.exit_code


class VolumeDaemon:
    """One open volume and everything connected to it."""

    def __init__(
        self, loop: Loop, authority: Authority, opened: opening.Opened, options: Options
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
        self.stopping = False
        self._control: ControlServer | None = None
        self.engine.room.on_room = self.member_drained
        self.members = Members(self, opened)

    def catch_up(self, choice: Choice, done: Callable[[BlockdError | None], None]) -> None:
        """Before `serve`: repeat the last changes of a dead owner on members that lack them."""
        links = self.engine.links
        ranges = {place for lacking in choice.behind.values() for place in lacking}
        CatchUp(self.engine, ranges, [links[uuid] for uuid in choice.behind], done).start()
        self.send_everything()

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
        layer = record.layer_named(snapshot)
        if at and layer is None:
            return None
        others = [other.name for other in record.layers if other.name and other is not layer]
        return Export(
            name=f"{record.volume_name}@{snapshot}" if at else record.volume_name,
            size_bytes=record.size_bytes,
            read_only=bool(at),
            minimum_block=1,  # smaller writes are completed to whole blocks here
            preferred_block=self.options.block_size,
            description=f"snapshot {snapshot}" if at else "live volume",
            contexts=(nbd.BASE_ALLOCATION, *[CHANGED_CONTEXT + name for name in others]),
        )

    def layer_of(self, export_name: str) -> int:
        """The layer a client of `export_name` reads; 0 is the live volume."""
        _, at, snapshot = export_name.partition("@")
        return self.structure.find(snapshot).id if at else 0

    def readers_of(self, layer_id: int) -> int:
        """How many clients use the export of a snapshot, or with 0 of the live volume."""
        return sum(1 for connection in self.connections if connection.layer_id == layer_id)

    # ---- sending --------------------------------------------------------------------------

    def send_to_members(self) -> bool:
        """Send all outboxes of members; True if nothing is left in them."""
        sent = True
        for member in tuple(self.members.sockets.values()):  # one that fails to send leaves
            if member.link.queue and not member.flush():
                sent = False
        if not sent:
            self._look_for_congestion()
        return sent

    def _look_for_congestion(self) -> None:
        self.congested = self.engine.room.waiting_bytes > WAITING_BYTES_MAX or any(
            member.link.outbox.size_bytes() > CONGESTION_BYTES
            for member in self.members.sockets.values()
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

    def sending(self, call: Callable[[], None]) -> Callable[[], None]:
        """`call`, and then what it has queued is sent; for timers and posts."""

        def run() -> None:
            call()
            self.send_everything()

        return run

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
        if (
            engine.pending
            or engine.locks.held
            or self.structure.busy
            or engine.rebuilds
            or engine.scrub
        ):
            for rebuild in sorted(engine.rebuilds, key=lambda each: each.link.replica_uuid):
                rebuild.abort("the volume daemon stops")
            if engine.scrub is not None:
                engine.scrub.abort("the volume daemon stops")
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
        self.members.close()


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
        self.consumer_alive: bool = arguments.consumer_alive
        self.min_in_sync: int = arguments.min_in_sync
        self.answer_seconds_max: float = arguments.answer_timeout
        self.rebuild_bytes_per_second: float | None = None
        if arguments.rebuild_bandwidth is not None:
            self.rebuild_bytes_per_second = parse_rate(arguments.rebuild_bandwidth)
        check_min_in_sync(self.min_in_sync)
        if not self.answer_seconds_max > 0:
            raise RequestError(f"--answer-timeout {self.answer_seconds_max} is not above 0 seconds")
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
    parse.add_argument(
        "--consumer-alive",
        action="store_true",
        help="the volume's user still runs: open nothing that may have lost unflushed writes",
    )
    parse.add_argument(
        "--min-in-sync",
        type=int,
        default=1,
        metavar="N",
        help="of a new volume: answer writes only while N replicas are in sync (1)",
    )
    parse.add_argument(
        "--answer-timeout",
        type=float,
        default=ANSWER_SECONDS_MAX,
        metavar="SECONDS",
        help="put a replica out that takes longer while others do not (2)",
    )
    parse.add_argument(
        "--rebuild-bandwidth",
        metavar="RATE",
        help="copy at most so much per second to a replica; example: 50M",
    )
    return parse


def main(arguments: list[str]) -> int:
    """Open the volume and serve it until told to stop."""
    parsed = parser().parse_args(arguments)

    def serve() -> int:
        options = Options(parsed)
        authority = SqliteAuthority(options.state)
        loop = Loop()
        wanted = opening.Wanted(
            options.name,
            options.volume_uuid,
            options.replicas,
            options.key,
            loop,
            options.consumer_alive,
            options.min_in_sync,
        )
        opened = opening.open_volume(authority, wanted, process.log)
        if opened.record.volume_name != options.name:
            raise StateError(
                f"volume {options.volume_uuid} is named {opened.record.volume_name}, not "
                f"{options.name}"
            )
        daemon = VolumeDaemon(loop, authority, opened, options)
        process.on_signals(loop, daemon.stop)

        def serving(error: BlockdError | None) -> None:
            if error is not None:
                process.log(str(error))
                daemon.exit_code = error.exit_code
                loop.stop()
                return
            daemon.serve()
            process.write_pid_file(options.pid_file)
            where = ", ".join(server.address for server in daemon.servers) or "no NBD address"
            print(f"ready volume {options.name} on {where}", flush=True)

        daemon.catch_up(opened.choice, serving)
        loop.run()
        daemon.close()
        return daemon.exit_code

    return process.run(serve)
